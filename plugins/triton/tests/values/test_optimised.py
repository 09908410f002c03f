"""Kernels put into models by `kpt.optimize`: found by the plugin's recognisers, judged, timed, committed.

The interpreter is a thousand times slower than a GPU, so the model's own code is made slower still: by a
matrix product that changes nothing. What is proved here is the way from the recogniser to the receipt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import kpt
import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import sites, skinny_sites
from kpt_plugin_triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


class Offered:
    """The plugin, with only the kernels of one op, for the device of the tests."""

    __name__ = "offered"

    def __init__(self, op: str) -> None:
        self.op = op

    @kpt.hookimpl
    def kpt_ops(self) -> Iterator[Any]:
        yield from plugin.kpt_ops()

    @kpt.hookimpl
    def kpt_kernels(self) -> Iterator[Any]:
        for spec in plugin.kpt_kernels():
            if spec.op == self.op:
                yield replace(spec, hardware=(DEVICE,))


@pytest.fixture(autouse=True)
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs kernels on CPU tensors: sites are taken for those of a GPU."""
    if INTERPRETED:
        monkeypatch.setattr(sites, "on_gpu", lambda site: None)
        monkeypatch.setattr(skinny_sites, "on_gpu", lambda site: None)


class Slowly(nn.Module):
    """Does what ``inner`` does after a matrix product whose every element is multiplied by zero."""

    def __init__(self, inner: nn.Module, size: int = 2000) -> None:
        super().__init__()
        self.inner = inner
        self.ballast = nn.Buffer(torch.rand(size, size), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.0 * (self.ballast @ self.ballast)[0, 0]  # type: ignore[no-any-return]


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Slowly(nn.GroupNorm(2, 8))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))  # type: ignore[no-any-return]


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Slowly(nn.Sequential(nn.Linear(16, 24), nn.GELU()))
        self.last = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("op", "kind", "shape", "site"),
    [
        ("group_norm", Groups, (2, 8, 3, 3), "norm"),
        ("bias_activation", Bias, (6, 16), "layer"),
    ],
)
def test_a_kernel_is_found_judged_and_committed(
    op: str, kind: type[nn.Module], shape: tuple[int, ...], site: str
) -> None:
    torch.manual_seed(0)
    model, example = kind().to(DEVICE).eval(), torch.randn(shape, device=DEVICE)
    fresh = torch.randn(shape, device=DEVICE)
    with torch.no_grad():
        expected = model(fresh)
    kpt.optimize(model, example, level="exact", plugins=[Offered(op)], budget=1200.0, cache=False)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == [f"{op}/triton"], (receipt.rejected, receipt.skipped)
    assert any((found["op"], found["path"]) == (op, site) for found in receipt.sites)
    with torch.no_grad():
        torch.testing.assert_close(model(fresh), expected, rtol=1e-4, atol=1e-5)
    assert kpt.report(model).calls["optimized"] == 1
    kpt.restore(model)
    with torch.no_grad():
        assert torch.equal(model(fresh), expected)


def skips(model: nn.Module, example: Any, op: str) -> dict[str, str]:
    kpt.optimize(model, example, plugins=[Offered(op)], budget=20.0, cache=False, level="aggressive")
    return {skip["name"]: skip["reason"] for skip in kpt.report(model).skipped}  # type: ignore[no-any-return]


class Attends(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features, self.qkv = features, nn.Linear(16, 3 * features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, self.features)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_bad_input_is_a_skip_with_that_reason() -> None:
    """What a kernel refuses with an error when it is called directly, it refuses as a site, too."""
    wide = Attends(520).to(DEVICE).eval()
    found = skips(wide, torch.randn(2, 5, 16, device=DEVICE), "attention")
    assert "q has 520 features; supported are up to" in found["attention/triton"]
    assert "float32; supported: bfloat16, float16" in found["attention/sdpa-cudnn"] or (
        "q has 520 features; cuDNN takes" in found["attention/sdpa-cudnn"]
    )


def test_many_rows_are_a_skip_with_that_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 24)).to(DEVICE).to(torch.float16).eval()
    example = torch.randn(40, 16, device=DEVICE, dtype=torch.float16)
    found = skips(model, example, "linear")
    assert "40 rows or more" in found["linear/triton"] and "40 rows or more" in found["linear/triton-int8"]


def test_an_op_without_a_recogniser_says_so_and_one_with_a_recogniser_found_nothing() -> None:
    model, example = nn.Sequential(nn.Linear(16, 4)).to(DEVICE).eval(), torch.randn(6, 16, device=DEVICE)
    direct = skips(model, example, "decode_attention")["decode_attention/triton"]
    assert direct == "kpt does not recognise sites of this op in models; call it directly"
    other = skips(model, example, "group_norm")["group_norm/triton"]
    assert other == "nothing in the model was recognised as group_norm"
