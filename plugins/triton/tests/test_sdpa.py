"""attention/sdpa-cudnn: which sites it takes, what it refuses, and what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops
from kpt.judge.calls import Call
from kpt_plugin_triton import checks, sdpa
from kpt_plugin_triton.checks import KernelInputError


def qkv(
    features: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    keys: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def drawn(seed: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, count, 40, features, generator=generator).to(device, dtype)

    return drawn(0, 4), drawn(1, keys), drawn(2, keys)


class Attends(nn.Module):
    def forward(self, q: Any, k: Any, v: Any, mask: Any = None, causal: bool = False) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def site(*args: Any) -> ops.Site:
    """A site that a model would have on a GPU of the newest kind."""
    (found,) = ops.recognise(Attends().eval(), [Call(args, {})]).of("attention")
    return replace(found, devices=("cuda:0",))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


@pytest.mark.usefixtures("hopper")
def test_it_takes_plain_and_causal_attention_of_half_precision() -> None:
    assert sdpa.supports(site(*qkv())) is None
    assert sdpa.supports(site(*qkv(dtype=torch.float16), None, True)) is None
    assert sdpa.supports(site(*qkv(128))) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (qkv(dtype=torch.float32), "the site is in float32"),
        (qkv(136), "q has 136 features"),
        (qkv(20), "q has 20 features"),
        ((*qkv(), torch.ones(2, 1, 40, 40, dtype=torch.bool)), "the site has a mask"),
    ],
)
def test_it_refuses_what_cudnn_has_not(args: tuple[Any, ...], reason: str) -> None:
    refusal = sdpa.supports(site(*args))
    assert refusal is not None and refusal.startswith(reason)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", ["softcap", "sinks", "window"])
def test_it_refuses_sites_with_an_option_that_cudnn_has_not(name: str) -> None:
    known = site(*qkv())
    hypothesis = replace(known.binding.hypothesis, arguments={**known.binding.arguments, name: "2"})
    refusal = sdpa.supports(replace(known, binding=replace(known.binding, hypothesis=hypothesis)))
    assert refusal == f"the site has {name}, which cuDNN's attention as PyTorch calls it has not"


def test_it_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    known = site(*qkv())
    assert "Triton kernels need a GPU" in str(sdpa.supports(replace(known, devices=("cpu",))))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert sdpa.supports(known) == "cuDNN is there on NVIDIA GPUs only"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    assert "this GPU is older" in str(sdpa.supports(known))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own attention for CPUs in place of cuDNN's, behind the same checks."""
    from contextlib import nullcontext

    monkeypatch.setattr(checks, "INTERPRETED", True)
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda backend: nullcontext())


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"softcap": 2.0}, "softcap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"window": 3}, "window"),
        ({"mask": torch.ones(40, 40, dtype=torch.bool), "is_causal": True}, "mask"),
        ({"mask": torch.ones(40, 40, dtype=torch.float32)}, "mask"),
    ],
)
def test_a_call_with_what_it_has_not_names_the_argument(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(KernelInputError, match=f"attention/sdpa-cudnn: {argument} is"):
        sdpa.attention(*qkv(), **options)


@pytest.mark.usefixtures("on_cpu")
def test_fp32_is_refused_by_name() -> None:
    with pytest.raises(KernelInputError, match="q is float32; supported: bfloat16, float16"):
        sdpa.attention(*qkv(dtype=torch.float32))


CASES = [
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"mask": torch.rand(40, 40, generator=torch.Generator().manual_seed(3)) > 0.3},
]


def compare(device: str, options: dict[str, Any], keys: int, limit: float) -> None:
    """Values and gradients against fp64: at most ``limit`` times the error of the reference in bf16."""
    given = qkv(64, device=device, keys=keys)
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    upstream = torch.randn(2, 4, 40, 64, generator=torch.Generator().manual_seed(4)).to(device)
    plain = ops.reference("attention")

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        out = function(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    true, eager = run(plain, torch.float64), run(plain, torch.bfloat16)
    for mine, right, other in zip(run(sdpa.attention, torch.bfloat16), true, eager, strict=True):
        error, allowed = (mine.double() - right).norm(), (other.double() - right).norm()
        assert error <= limit * allowed, (float(error), float(allowed))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("keys", [4, 2])
def test_arguments_reach_pytorch_as_the_op_means_them(options: dict[str, Any], keys: int) -> None:
    compare("cpu", options, keys, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("keys", [4, 2])
def test_values_and_gradients_of_cudnn(options: dict[str, Any], keys: int) -> None:
    if torch.version.hip is not None or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("cuDNN's attention is chosen from compute capability 9.0 on")
    compare("cuda", options, keys, 1.3)
