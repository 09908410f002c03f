"""bf16, int8 and oneDNN's products: values, interface and weights stay, reasons to skip."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import PROFILE, applied, observe, relative, skips, variants

from kpt.transaction.plan import Candidate, assemble
from kpt_plugin_cpu import int8_linear, onednn
from kpt_plugin_cpu.bf16 import Bf16
from kpt_plugin_cpu.casting import widened
from kpt_plugin_cpu.inductor import Inductor, compiler
from kpt_plugin_cpu.int8 import Int8
from kpt_plugin_cpu.int8_linear import Int8Linear, largest_weight, quantize_weight


@torch.no_grad()
def test_bf16_keeps_the_interface_and_the_weights(mlp):
    x = torch.randn(4, 128)
    (offer,) = variants(Bf16(), observe(mlp, x))
    behaviour, space, undo = applied(Bf16, mlp, offer)
    output = space.forward(x)
    assert output.dtype is torch.float32
    assert 0 < relative(output, mlp(x)) < 2e-2
    assert behaviour.verify_applied(space)
    assert all(p.dtype is torch.float32 for p in mlp.parameters())
    undo()


@torch.no_grad()
def test_bf16_gives_double_where_eager_does():
    """A wrong dtype would be rejected, and the trial wasted."""
    model, x = nn.Sequential(nn.Linear(128, 8)).double().eval(), torch.randn(4, 128).double()
    (offer,) = variants(Bf16(), observe(model, x))
    _, space, undo = applied(Bf16, model, offer)
    output = space.forward(x)
    assert output.dtype is torch.float64
    assert 0 < relative(output, model(x)) < 2e-2
    undo()


def test_bf16_leaves_models_alone_whose_weights_are_of_both_widths():
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 8).double())
    assert "float64" in skips(Bf16(), observe(model, torch.randn(4, 128)))[0]


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class ReturnsFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> Frozen:
        return Frozen(self.linear(x))


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_bf16_widens_what_a_frozen_dataclass_holds(compiled: bool):
    model, x = ReturnsFrozen().eval(), torch.randn(4, 128)
    (offer,) = variants(Bf16(), observe(model, x))
    _, space, undo = applied(Bf16, model, offer)
    run = torch.compile(space.forward, backend="eager") if compiled else space.forward
    output = run(x)
    assert output.logits.dtype is torch.float32
    assert 0 < relative(output.logits, model(x).logits) < 2e-2
    undo()


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    more: list[torch.Tensor]
    scale: float = 2.0


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 8)

    def forward(self, batch: Batch) -> torch.Tensor:
        return (self.linear(batch.x) + self.linear(batch.more[0])) * batch.scale


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_bf16_narrows_what_a_dataclass_brings_in(compiled: bool):
    model, batch = TakesBatch().eval(), Batch(torch.randn(4, 128), [torch.randn(4, 128)])
    (offer,) = variants(Bf16(), observe(model, batch.x))
    _, space, undo = applied(Bf16, model, offer)
    run = torch.compile(space.forward, backend="eager") if compiled else space.forward
    assert 0 < relative(run(batch), model(batch)) < 2e-2
    assert batch.x.dtype is batch.more[0].dtype is torch.float32
    undo()


class Cache:
    """What state-space models return beside their outputs: states by layer, and what holds them."""

    def __init__(self, state: torch.Tensor) -> None:
        self.states = {0: state}
        self.layers = [state]
        self.names = ("state",)


class ReturnsCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        hidden = self.linear(x)
        return {"logits": hidden, "cache": Cache(hidden)}


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_bf16_widens_what_containers_of_an_object_hold(compiled: bool):
    model, x = ReturnsCache().eval(), torch.randn(4, 128)
    (offer,) = variants(Bf16(), observe(model, x))
    _, space, undo = applied(Bf16, model, offer)
    run = torch.compile(space.forward, backend="eager", fullgraph=True) if compiled else space.forward
    output = run(x)
    held = [output["logits"], output["cache"].states[0], output["cache"].layers[0]]
    assert [tensor.dtype for tensor in held] == [torch.float32] * 3
    undo()


class Box:
    def __init__(self, inner: object) -> None:
        self.inner = inner


class Keeps(nn.Module):
    """Returns objects that it keeps, and computes with what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 8)
        self.frozen = Frozen(torch.zeros(8, dtype=torch.bfloat16))
        self.cache = Box([Box(torch.ones(8, dtype=torch.bfloat16))])
        self.table = {"keys": [torch.ones(8, dtype=torch.bfloat16)]}

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        kept = self.frozen, self.cache, Box(self.table)
        return self.linear(x), *kept


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_bf16_leaves_alone_what_the_model_keeps(compiled: bool):
    model, x = Keeps().eval(), torch.randn(4, 128)
    (offer,) = variants(Bf16(), observe(model, x))
    _, space, undo = applied(Bf16, model, offer)
    run = torch.compile(space.forward, backend="eager") if compiled else space.forward
    _, frozen, cache, held = run(x)
    given = frozen.logits, cache.inner[0].inner, held.inner["keys"][0]
    kept = model.frozen.logits, model.cache.inner[0].inner, model.table["keys"][0]
    assert [tensor.dtype for tensor in given] == [torch.float32] * 3
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16] * 3
    if not compiled:
        twin = widened(SimpleNamespace(keys=kept[0]), torch.bfloat16, torch.float32)
        assert type(twin) is SimpleNamespace and twin.keys.dtype is torch.float32
    undo()


def test_bf16_needs_the_instructions_and_fp32_weights(mlp):
    x = torch.randn(2, 128)
    rates = {"float32": 1e11, "bfloat16": 1e9, "int8": 1.1e11}
    old = replace(PROFILE, native_dtypes=("float32",), matmul_rates=rates)
    assert skips(Bf16(), observe(mlp, x), old)
    assert "1.1 times the rate" in skips(Int8(), observe(mlp, x), old)[0]
    unmeasured = replace(old, matmul_rates={})
    assert skips(Int8(), observe(mlp, x), unmeasured) == ["this CPU has no int8 dot product"]
    # Pairs of products added in 16 bits, as AVX2 has them, are faster than float32's, too.
    (offer,) = variants(Int8(), observe(mlp, x), replace(old, matmul_rates={**rates, "int8": 2e11}))
    assert offer.name == "linears, float32 between" and offer.compute_dtype == "int8"
    half = nn.Sequential(nn.Linear(128, 128)).bfloat16()
    assert skips(Bf16(), observe(half, x.bfloat16()))


@torch.no_grad()
def test_int8_multiplies_integers(mlp):
    x = torch.randn(16, 128)
    for offer in variants(Int8(), observe(mlp, x)):
        behaviour, space, undo = applied(Int8, mlp, offer)
        with torch.profiler.profile() as profile:
            output = space.forward(x)
        names = {event.key for event in profile.key_averages()}
        assert any("qlinear" in name for name in names)
        assert not any(name in ("aten::addmm", "aten::linear") for name in names)
        assert 0 < relative(output, mlp(x)) < 5e-2
        assert behaviour.verify_applied(space)
        undo()


@torch.no_grad()
def test_int8_rows_do_not_share_a_scale():
    """One row of outliers must not cost the others their precision."""
    linear = nn.Linear(128, 64).eval()
    x = torch.randn(8, 128)
    x[0] *= 1e4
    output, expected = Int8Linear(linear)(x), linear(x)
    for row in range(8):
        assert relative(output[row], expected[row]) < 3e-2


def test_int8_weights_are_symmetric_per_channel():
    weight = torch.randn(6, 32) * torch.logspace(-4, 4, 6)[:, None]
    quantized, scale = quantize_weight(weight)
    assert quantized.dtype is torch.int8
    assert int(quantized.abs().max()) == largest_weight()
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@torch.no_grad()
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_int8_products_do_not_saturate(sign):
    """Where two products are added in 16 bits, those of the largest codes and weights are cut off."""
    linear = nn.Linear(256, 64, bias=False).eval()
    linear.weight.fill_(sign)
    x = torch.ones(4, 256)
    assert relative(Int8Linear(linear)(x), linear(x)) < 1e-5


@torch.no_grad()
def test_int8_weights_lose_a_bit_where_products_saturate(monkeypatch):
    weight = torch.randn(6, 32) * torch.logspace(-4, 4, 6)[:, None]
    product = int8_linear._product
    largest_weight.cache_clear()
    cut = 2**15 - 1
    monkeypatch.setattr(int8_linear, "_product", lambda *given: product(*given).clamp(-cut, cut))
    quantized, scale = quantize_weight(weight)
    largest_weight.cache_clear()
    assert int(quantized.abs().max()) == 63
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


@torch.no_grad()
def test_int8_does_not_ask_for_the_default_dtype():
    linear, x = nn.Linear(128, 64).eval(), torch.randn(8, 128)
    expected = linear(x)
    largest_weight.cache_clear()
    int8_linear._constants.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = Int8Linear(linear)
        assert layer.one.dtype is torch.float32 and relative(layer(x), expected) < 3e-2
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def test_int8_of_zeros_and_of_no_rows():
    layer = Int8Linear(nn.Linear(128, 64).eval())
    assert torch.isfinite(layer(torch.zeros(3, 128))).all()


def test_int8_skips_models_without_large_linears():
    small = nn.Sequential(nn.Linear(8, 8))
    assert "linear" in skips(Int8(), observe(small, torch.randn(2, 8)))[0]


def test_int8_is_judged_as_a_lower_precision_whatever_is_between(mlp):
    offers = {offer.params["rest"]: offer for offer in variants(Int8(), observe(mlp, torch.randn(2, 128)))}
    assert offers["float32"].compute_dtype == "int8"
    assert offers["bfloat16"].compute_dtype == "bfloat16"
    assert offers["bfloat16"].predicted_gain > offers["float32"].predicted_gain


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("int8", "first"), [(8.5e11, "int8"), (2e11, "bf16")])
@pytest.mark.parametrize("operations", [1e8, 9e8])
def test_the_first_aggressive_stack_has_the_fastest_products_measured(mlp, int8, first, operations):
    rates = {"float32": 1e11, "float32:onednn": 2e11, "bfloat16": 4.5e11, "int8": int8}
    profile = replace(PROFILE, matmul_rates=rates)
    observation = observe(mlp, torch.randn(2, 128), hardware=profile, operations=operations)
    candidates = [
        Candidate(offer, phase, "cpu", source, kind)
        for source, kind, phase in (
            ("bf16", Bf16, "precision"),
            ("int8", Int8, "precision"),
            ("inductor", Inductor, "compile"),
        )
        for offer in variants(kind(), observation, profile)
    ]
    precision, compiled = sorted(assemble(candidates).steps, key=lambda step: step.phase, reverse=True)
    assert precision.source == first
    assert precision.variant.params.get("rest", "bfloat16") == "bfloat16"
    assert compiled.source == "inductor" and compiled.variant.params["freeze"]


def test_onednn_is_predicted_from_the_measured_rates(mlp):
    share = 0.6  # of eager's time in products, at the measured 1e11 operations a second
    observation = observe(mlp, torch.randn(2, 128), operations=share * 1e9, baseline_seconds=1e-2)
    assert onednn.predict(observation, PROFILE, ()) == pytest.approx(1 / (share / 2 + 1 - share))
    level = replace(PROFILE, matmul_rates={"float32": 1e11, "float32:onednn": 1e11})
    assert onednn.predict(observation, level, ()) == pytest.approx(1.0)
    unknown = replace(PROFILE, matmul_rates={})
    assert 1.0 < onednn.predict(observation, unknown, ()) < 1.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_onednn_refuses_weights_that_it_cannot_pack_before_a_trial(dtype):
    def site(weight):
        return SimpleNamespace(devices=("cpu",), weights=lambda: {"weight": weight})

    assert str(dtype) in (onednn.supports(site(torch.zeros(4, 4, dtype=dtype))) or "")
    assert onednn.supports(site(torch.zeros(4, 4))) is None
