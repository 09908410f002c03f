"""Padding in `nn.TransformerEncoder`: captured graphs put zeros where eager code does, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kpt
from kpt.compiling import CompiledForward, zero_padding
from kpt.transaction import workspace

WIDTH = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]


def encoder(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    last = nn.LayerNorm(WIDTH) if options.pop("norm", False) else None
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, norm=last).eval()


def masks() -> dict[str, torch.Tensor]:
    """Of the batch [4, 6]: True is padding."""
    end = torch.zeros(4, 6, dtype=torch.bool)
    end[1, 4:] = end[2, 1:] = True
    empty = end.clone()
    empty[3] = True
    between = end.clone()
    between[0, 2] = True
    return {"end": end, "none": end & False, "a row of it": empty, "front": end.flip(1), "between": between}


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("check", [True, False])
def test_one_graph_gives_what_eager_gives_with_every_mask(norm: bool, check: bool) -> None:
    model, x = encoder(norm=norm), torch.randn(4, 6, WIDTH)
    model.mask_check = check
    copy = workspace.clone(model)
    zero_padding(copy)
    captured = CompiledForward(copy.forward, backend="eager")
    for mask in masks().values():
        expected = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(captured(x, src_key_padding_mask=mask), expected)
        torch.testing.assert_close(copy(x, src_key_padding_mask=mask), expected)
    assert captured.graphs == 1 and captured.misses == 0


@pytest.mark.parametrize("how", ["trains", "pairs", "gradients", "no zeros", "own"])
def test_where_eager_puts_no_zeros_there_are_none(how: str) -> None:
    model, x, mask = encoder(dropout=0.0), torch.randn(4, 6, WIDTH), masks()["end"]
    pairs = torch.zeros(6, 6, dtype=torch.bool) if how == "pairs" else None
    if how == "no zeros":
        model = nn.TransformerEncoder(model.layers[0], 2, enable_nested_tensor=False).eval()
    elif how == "own":
        model.__class__ = type("Own", (nn.TransformerEncoder,), {"forward": lambda self, src, *_, **__: src})
    copy = workspace.clone(model.train(how == "trains"))
    zero_padding(copy)
    captured = CompiledForward(copy.forward, backend="eager")
    with torch.set_grad_enabled(how in ("trains", "gradients")):
        expected = model(x, pairs, mask)
        torch.testing.assert_close(captured(x, pairs, mask), expected)
    assert how == "trains" or bool(expected[2, 1:].any())


def test_a_padded_batch_is_served_by_a_captured_graph() -> None:
    model, x, mask = encoder(), torch.randn(4, 6, WIDTH), masks()["end"]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        kpt.optimize(model, {"src": x, "src_key_padding_mask": mask}, level="exact", plugins=[Captures()])
        report = kpt.report(model)
        found = {entry.name: entry.rule for entry in (*report.accepted, *report.rejected)}
        assert [rule for name, rule in found.items() if name.startswith("captured")], str(report)
        assert set(found.values()) <= {"kept", "slower"}, str(report)
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)


class Captures:
    """The cpu plugin's captured graphs alone."""

    @kpt.hookimpl
    def kpt_passes(self) -> list[kpt.specs.PassSpec]:
        return [kpt.specs.PassSpec("captured", "compile", "kpt_plugin_cpu.captured:Captured")]
