"""Compiled and captured graphs: the values, the bits of samples, live weights, and when none is offered."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import PROFILE, applied, observe, relative, skips, variants

import kpt
from kpt.compiling import CompiledForward
from kpt.judge.timing import Timing
from kpt.specs import HardwareProfile, PassSpec, Variant
from kpt.transaction.commit import Committed
from kpt.transaction.observe import Observation
from kpt.transaction.trial import Trials
from kpt_plugin_cpu.captured import Captured
from kpt_plugin_cpu.estimates import compile_seconds, gain_of_dtype, gain_of_packing
from kpt_plugin_cpu.inductor import Inductor, compiler, packing_for_onednn, repeated_blocks, settings


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@torch.no_grad()
def test_frozen_inductor_computes_the_same_and_its_undo_restores(mlp):
    x = torch.randn(4, 128)
    offers = {offer.name: offer for offer in variants(Inductor(), observe(mlp, x))}
    assert offers["frozen"].derives and not offers["live"].derives
    assert offers["frozen"].predicted_gain > offers["live"].predicted_gain > 1.0
    weights = [parameter.clone() for parameter in mlp.parameters()]
    behaviour, space, undo = applied(Inductor, mlp, offers["frozen"])
    assert not behaviour.verify_applied(space)
    assert relative(space.forward(x), mlp(x)) < 1e-6
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__
    assert all(torch.equal(a, b) for a, b in zip(weights, mlp.parameters()))


class Sampling(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.encode(x)
        return mean + torch.randn_like(mean) * mean.exp()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@torch.no_grad()
@pytest.mark.parametrize("name", ["live", "frozen"])
def test_a_model_that_samples_gives_what_eager_gives_of_the_same_seed(name: str) -> None:
    model, x = Sampling().eval(), torch.randn(4, 16)
    offers = {offer.name: offer for offer in variants(Inductor(), observe(model, x))}
    _, space, undo = applied(Inductor, model, offers[name])
    space.forward(x)
    torch.manual_seed(3)
    true = model(x)
    torch.manual_seed(3)
    assert relative(space.forward(x), true) < 1e-6
    undo()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@torch.no_grad()
def test_templates_compete_with_the_library(mlp, capfd):
    """Inductor's autotuner asks for torch's precision, which oneDNN's permission made an error."""
    x = torch.randn(4, 128)
    offers = {offer.name: offer for offer in variants(Inductor(), observe(mlp, x))}
    behaviour, space, undo = applied(Inductor, mlp, offers["max-autotune"])
    assert relative(space.forward(x), mlp(x)) < 1e-6
    assert behaviour.verify_applied(space)
    undo()
    written = "".join(capfd.readouterr()).lower()
    assert "autotune" not in written, "what torch writes about the contest is on the user's screen"


@torch.no_grad()
def test_permission_for_reduced_precision_ends_with_compilation():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), packing_for_onednn():
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        raise RuntimeError("inside")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@torch.no_grad()
def test_a_captured_graph_computes_the_same_bits_and_follows_the_weights(mlp):
    x = torch.randn(4, 128)
    (offer,) = variants(Captured(), observe(mlp, x, baseline_seconds=1e-3))
    assert not offer.derives and offer.predicted_gain > 1.0
    assert offer.setup_seconds < 0.5 * compile_seconds(observe(mlp, x))
    behaviour, space, undo = applied(Captured, mlp, offer)
    assert not behaviour.verify_applied(space)
    assert torch.equal(space.forward(x), mlp(x))
    mlp[0].weight.mul_(2.0)
    assert torch.equal(space.forward(x), mlp(x))
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__


def test_a_graph_is_not_captured_where_hardly_any_time_is_between_operations(mlp):
    (reason,) = skips(Captured(), observe(mlp, torch.randn(4, 128), baseline_seconds=1.0))
    assert "too little" in reason


def timed_as(timing: Timing) -> Any:
    """A `Committed.time` that calls the model once, which counts as reaching the plan; says ``timing``."""

    def time(committed: Committed, model: torch.nn.Module, trials: Trials) -> Timing:
        with torch.no_grad():
            trials.baseline.draw().on(model)
        return timing

    return time


PACKING = replace(PROFILE, matmul_rates={**PROFILE.matmul_rates, "bfloat16:onednn": 12e11})
bf16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 product for this CPU",
)


def packing(observation: Observation, profile: HardwareProfile = PACKING) -> Variant | None:
    offers = {offer.name: offer for offer in variants(Captured(), observation, profile)}
    return offers.get("whole, packed weights")


def test_packing_is_offered_where_it_is_measured_to_pay_in_the_dtype_that_the_level_allows(mlp):
    x = torch.randn(4, 128)
    offer = packing(observe(mlp, x, level="production"))
    assert offer is not None and offer.derives
    whole = {o.name: o for o in variants(Captured(), observe(mlp, x, baseline_seconds=1e-3))}["whole"]
    faster = packing(observe(mlp, x, baseline_seconds=1e-3))
    assert faster is not None and faster.predicted_gain > whole.predicted_gain
    assert packing(observe(mlp, x), PROFILE) is None, "the rate of packed weights is not measured"
    level = replace(PACKING, matmul_rates={**PACKING.matmul_rates, "bfloat16:onednn": 4e11})
    assert packing(observe(mlp, x), level) is None
    assert packing(observe(mlp, x, level="exact")) is None
    assert packing(observe(mlp, x, mode="training")) is None
    half = copy.deepcopy(mlp).bfloat16()
    assert packing(observe(half, x.bfloat16(), level="exact")) is not None
    uncounted = observe(half, x.bfloat16(), operations=0.0, baseline_seconds=1e-2)
    assert gain_of_packing(uncounted, PACKING) > 1.1, "half of a call counts as products"
    one = copy.deepcopy(mlp)
    one[0].bias.data = one[0].bias.data.bfloat16()
    assert packing(observe(one, x, level="exact")) is None, "most of it is in fp32"
    unmeasured = skips(Captured(), observe(half, x.bfloat16()), PROFILE)
    assert any("packed weights: not faster by the measured rates" in reason for reason in unmeasured)


def test_weights_are_packed_for_the_library_that_is_measured_to_be_faster(mlp):
    """MKL's packed weights outrun oneDNN's on some CPUs; inductor has them for a known number of rows."""

    def offered(mkl: float, **shapes: object) -> dict[str, tuple[bool, float]]:
        profile = replace(PROFILE, matmul_rates={**PROFILE.matmul_rates, "float32:mkl": mkl})
        observation = observe(mlp, torch.randn(4, 128), operations=8e8, baseline_seconds=1e-2, **shapes)
        offers = variants(Inductor(), observation, profile)
        return {v.name: (v.params["onednn"], v.predicted_gain) for v in offers if v.name.startswith("frozen")}

    slower, faster, close = offered(1e11), offered(4e11), offered(2.1e11)
    assert set(slower) == {"frozen", "frozen, C++ wrapper"} == set(faster)
    assert slower["frozen"][0] and not faster["frozen"][0] and not faster["frozen, C++ wrapper"][0]
    assert faster["frozen"][1] > slower["frozen"][1]
    assert not close["frozen"][0] and close["frozen, oneDNN"][0]
    assert close["frozen"][1] > close["frozen, oneDNN"][1]
    assert offered(1.9e11)["frozen, MKL"][0] is False
    assert offered(4e11, dynamic_shapes={"input": {0: "rows"}})["frozen"][0]
    slow = replace(
        PROFILE, matmul_rates={**PROFILE.matmul_rates, "float32:onednn": 0.9e11, "float32:mkl": 2e11}
    )
    dynamic = observe(mlp, torch.randn(4, 128), dynamic_shapes={"input": {0: "rows"}})
    (frozen,) = [v for v in variants(Inductor(), dynamic, slow) if v.name == "frozen"]
    assert frozen.params["onednn"] and "oneDNN" in frozen.note


@bf16
@torch.no_grad()
@pytest.mark.parametrize("shapes", [None, {"input": {0: "rows"}}])
def test_a_captured_graph_with_packed_weights_holds_copies_until_it_is_undone(mlp, shapes):
    half, x = mlp.bfloat16(), torch.randn(4, 128).bfloat16()
    offer = packing(observe(half, x, level="exact", dynamic_shapes=shapes))
    behaviour, space, undo = applied(Captured, half, offer)
    assert not behaviour.verify_applied(space)
    for rows in (4, 7, 1) if shapes else (4,):
        x = torch.randn(rows, 128).bfloat16()
        assert relative(space.forward(x), half(x)) < 1e-2
    assert behaviour.verify_applied(space)
    assert len(behaviour.packed.packed) >= sum(isinstance(each, nn.Linear) for each in half)
    copies = [weakref.ref(each) for each in behaviour.packed.packed]
    undo()
    assert "forward" not in space.__dict__
    del behaviour, undo, space
    gc.collect()
    assert not any(each() is not None for each in copies)


@torch.no_grad()
def test_packing_that_finds_no_weight_to_pack_had_no_effect(mlp):
    x = torch.randn(4, 128)
    behaviour, space, undo = applied(Captured, mlp, packing(observe(mlp, x)))
    assert torch.equal(space.forward(x), mlp(x))
    assert not behaviour.verify_applied(space)
    undo()


class Biased(nn.Module):
    """A linear layer with a bias of any shape and strides."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(48, 32).bfloat16())
        self.bias = nn.Parameter(bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


@bf16
@torch.no_grad()
@pytest.mark.parametrize(
    ("bias", "packs"),
    [
        (torch.randn(96).bfloat16()[::2], True),
        (torch.randn(1).bfloat16().expand(48), True),
        (torch.randn(1).bfloat16(), False),
        (torch.randn(1, 48).bfloat16(), False),
        (torch.randn(5, 48).bfloat16(), False),
    ],
)
def test_a_bias_of_any_strides_is_added_and_one_of_another_shape_is_not_packed_for(bias, packs):
    """oneDNN reads N elements one after the other, whatever they are."""
    torch.manual_seed(0)
    model, x = Biased(bias).eval(), torch.randn(5, 32).bfloat16()
    behaviour, space, undo = applied(Captured, model, packing(observe(model, x, level="exact")))
    assert relative(space.forward(x), model(x)) < 1e-2
    assert behaviour.verify_applied(space) is packs
    if packs:  # it is read at each call, as it is then
        model.bias.data = torch.randn(96).bfloat16()[::2]
        assert relative(space.forward(x), model(x)) < 1e-2
    undo()


@bf16
@torch.no_grad()
def test_one_packed_copy_serves_graphs_of_all_sizes(mlp):
    half = mlp.bfloat16()
    x = torch.randn(4, 128).bfloat16()
    behaviour, space, undo = applied(Captured, half, packing(observe(half, x, level="exact")))
    for rows in (4, 5, 9):
        space.forward(torch.randn(rows, 128).bfloat16())
    assert len(behaviour.packed.packed) == 2
    undo()


def test_predictions_of_packing_go_by_what_was_measured(mlp):
    x = torch.randn(4, 128)
    slow = {"float32": 1e11, "bfloat16": 2e10, "int8": 5e10}
    observation = observe(mlp, x, operations=8e8, baseline_seconds=1e-2)
    for dtype in ("bfloat16", "int8"):  # no packed rate: it is no reason to take them for as fast as fp32
        assert gain_of_dtype(observation, replace(PROFILE, matmul_rates=slow), dtype) < 0.7
    training = observe(mlp, x, mode="training")
    assert gain_of_dtype(training, PACKING, "bfloat16") == gain_of_dtype(training, PROFILE, "bfloat16")
    half = copy.deepcopy(mlp).bfloat16()
    filled = observe(half, x.bfloat16(), operations=0.8 * 4e11 * 1e-2, baseline_seconds=1e-2)
    twice = replace(PROFILE, matmul_rates={**PROFILE.matmul_rates, "bfloat16:onednn": 8e11})
    assert gain_of_packing(filled, twice) == pytest.approx(1.0 / 0.6)


@bf16
def test_optimised_in_bfloat16_its_packed_copies_follow_the_weights(monkeypatch):
    faster = Timing(2.0, 1.9, 2.1, 1e-3, 5e-4, 16)  # whether it pays is not the question
    monkeypatch.setattr(Trials, "time", lambda *given, **options: faster)
    monkeypatch.setattr(Committed, "time", timed_as(faster))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)]).eval().bfloat16()
    x = torch.randn(8, 64).bfloat16()

    class Offered:
        @kpt.hookimpl
        def kpt_passes(self):
            yield PassSpec("captured", "compile", "few_variants:Packed")

    kpt.optimize(model, (x,), level="exact", plugins=[Offered()], budget=30, cache=False)
    assert [entry.name for entry in kpt.report(model).accepted] == ["captured:whole, packed weights"]
    with torch.no_grad():
        plain = nn.Sequential(*model)
        assert relative(model(x), plain(x)) < 2e-2
        assert kpt.report(model).calls["optimized"] == 1
        model[3].weight.mul_(2.0)
        assert relative(model(x), plain(x)) < 2e-2
    counted = kpt.report(model).calls
    assert counted["fallback"] == 1 and "weights" in " ".join(counted["reasons"]), counted
    kpt.restore(model)


def test_training_without_repeated_blocks_is_offered_live_weights_only(mlp):
    names = [offer.name for offer in variants(Inductor(), observe(mlp, torch.randn(2, 128), mode="training"))]
    assert names == ["live"]


def test_repeated_blocks_are_the_outermost_layers_of_one_class():
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    assert repeated_blocks(nn.TransformerEncoder(layer, 3)) == ["layers.0", "layers.1", "layers.2"]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_without_a_compiler_the_reason_is_given(mlp, monkeypatch):
    monkeypatch.setattr("kpt_plugin_cpu.inductor.compiler", lambda: None)
    assert "C++ compiler" in skips(Inductor(), observe(mlp, torch.randn(2, 128)))[0]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(256), nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.linear(self.norm(x)))


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_backward_pass_may_be_repeated_as_eagers():
    """Compiled code that takes over saved memory refuses ``retain_graph=True``; that of a cache takes it."""
    model, x = Residual().train(), torch.randn(8, 256)
    offers = {offer.name: offer for offer in variants(Inductor(), observe(model, x, mode="training"))}
    twin = copy.deepcopy(model)
    own = {**settings(offers["live"].params), "backend": "inductor"}
    CompiledForward(twin.forward, **own)(x).square().sum().backward()  # its code is now in inductor's cache
    _, space, undo = applied(Inductor, model, offers["live"])
    loss = space.forward(x).square().sum()
    for retained in (True, False):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=retained)
        assert all(relative(mine, theirs.grad) < 1e-6 for mine, theirs in zip(found, twin.parameters()))
    undo()
