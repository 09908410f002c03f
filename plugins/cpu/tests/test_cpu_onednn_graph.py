"""Graphs by oneDNN Graph: values, structure, frozen weights, undo, reasons to skip."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import PROFILE, Convolutions, Only, applied, observe, relative, skips, variants

import kpt
from kpt.specs import Variant
from kpt_plugin_cpu.bf16 import Bf16
from kpt_plugin_cpu.inductor import Inductor, compiler
from kpt_plugin_cpu.onednn_graph import OnednnGraph, lower

pytestmark = pytest.mark.skipif(
    not hasattr(torch.jit, "enable_onednn_fusion") or not torch.backends.mkldnn.is_available(),
    reason="this torch has no oneDNN Graph",
)


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


class Net(Convolutions):
    """Returns a dictionary."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.features(x).mean((2, 3))
        return {"pooled": pooled, "logits": self.head(pooled)}


@torch.no_grad()
def test_the_same_values_and_structure_and_its_undo_restores():
    model, x = Net().eval(), torch.randn(2, 3, 12, 12)
    (offer,) = variants(OnednnGraph(), observe(model, x))
    assert offer.derives and offer.predicted_gain > 1.0
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    behaviour, space, undo = applied(OnednnGraph, model, offer)
    assert not behaviour.verify_applied(space)
    for _ in range(3):
        x = torch.randn(2, 3, 12, 12)
        found, expected = space.forward(x), model(x)
        assert list(found) == list(expected)
        assert all(relative(found[name], expected[name]) < 1e-6 for name in expected)
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


@torch.no_grad()
def test_products_are_run_by_it_and_weights_are_frozen():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(8, 16)
    expected = model(x)
    _, space, undo = applied(OnednnGraph, model, Variant("frozen"))
    space.forward(x)
    with torch.profiler.profile() as profile:
        space.forward(x)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::linear", "aten::addmm", "mkldnn::_linear_pointwise"}
    model[0].weight.mul_(2.0)
    assert relative(space.forward(x), expected) < 1e-6  # the transaction watches what is derived
    undo()


@torch.no_grad()
def test_other_sizes_get_code_of_their_own_until_it_is_sealed():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    behaviour, space, undo = applied(OnednnGraph, model, Variant("frozen"))
    for rows in (8, 3):
        x = torch.randn(rows, 16)
        assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.compiled.graphs == 2
    behaviour.compiled.seal()
    x = torch.randn(5, 16)
    assert torch.equal(space.forward(x), model(x))
    assert behaviour.compiled.misses == 1
    undo()


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no products in bf16 on this CPU"
)
@torch.no_grad()
def test_with_bf16_products_run_in_bf16():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(8, 64)
    _, space, undo = applied(Bf16, model, Variant("cast", compute_dtype="bfloat16"))
    graph = OnednnGraph()
    unwrap = graph.apply(space, Variant("frozen"))
    found = space.forward(x)
    assert found.dtype is torch.float32
    assert 1e-5 < relative(found, model(x)) < 2e-2
    unwrap()
    undo()


def test_a_graph_without_a_part_for_it_is_an_error_and_the_switch_is_put_back():
    before = torch.jit.onednn_fusion_enabled()
    graph = torch.fx.symbolic_trace(lambda x: (torch.sin(x),))
    with pytest.raises(RuntimeError, match="took no part"):
        lower(graph, [torch.randn(3)])
    assert torch.jit.onednn_fusion_enabled() == before


def test_reasons_to_skip():
    linear, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    assert "dynamic" in skips(OnednnGraph(), observe(linear, x, dynamic_shapes={"input": {0: "batch"}}))[0]
    assert "no linear layer" in skips(OnednnGraph(), observe(nn.Sequential(nn.ReLU()), x))[0]
    for dtype, known in ((torch.float64, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        native = ("float32", "float64", *(["bfloat16"] if known else []))
        other = observe(linear.to(dtype), x.to(dtype))
        found = skips(OnednnGraph(), other, replace(PROFILE, native_dtypes=native))
        assert bool(found) == (dtype is torch.float64 or not known), found
    linear.float()
    assert "300 MiB" in skips(OnednnGraph(), observe(linear, x, parameter_bytes=300 << 20))[0]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_it_comes_before_inductor_for_convolutions_only():
    def gains(model: nn.Module, x: torch.Tensor) -> tuple[float, float]:
        observation = observe(model, x)
        inductor = {offer.name: offer.predicted_gain for offer in variants(Inductor(), observation)}
        return variants(OnednnGraph(), observation)[0].predicted_gain, inductor["frozen"]

    mine, other = gains(Net().eval(), torch.randn(2, 3, 12, 12))
    assert mine > other
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    mine, other = gains(nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 5, 16))
    assert 1.0 < mine < other


@torch.no_grad()
def test_it_is_judged_like_any_other_pass():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    optimised = kpt.optimize(
        model,
        [torch.randn(32, 64) for _ in range(3)],
        plugins=[Only("onednn-graph")],
        level="exact",
        budget=60.0,
        cache=False,
    )
    receipt = kpt.report(optimised)
    (entry,) = [e for e in (*receipt.accepted, *receipt.rejected) if e.name == "onednn-graph:frozen"]
    assert entry in receipt.accepted or entry.rule == "slower", entry
    kpt.restore(optimised)
