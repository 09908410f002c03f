"""Each pass and policy: values, observable effect, undo, the user's weights untouched, reasons to skip."""

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
from kpt_plugin_cpu import onednn
from kpt_plugin_cpu.bf16 import Bf16
from kpt_plugin_cpu.captured import Captured
from kpt_plugin_cpu.casting import _widened
from kpt_plugin_cpu.channels_last import ChannelsLast
from kpt_plugin_cpu.estimates import compile_seconds
from kpt_plugin_cpu.inductor import Inductor, compiler, packing_for_onednn, repeated_blocks
from kpt_plugin_cpu.int8 import Int8
from kpt_plugin_cpu.int8_linear import Int8Linear, quantize_weight
from kpt_plugin_cpu.masks import DropMask
from kpt_plugin_cpu.packing import PackPadding
from kpt_plugin_cpu.threads import Threads


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128)).eval()


class Encoder(nn.Module):
    """Masked mean over embedded tokens, with a layer that mixes positions through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.project = nn.Linear(64, 64)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.project(self.embedding(input_ids))
        mask = attention_mask[:, None, None, :].bool() if attention_mask is not None else None
        heads = hidden.unflatten(-1, (4, 16)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return {"hidden": mixed.transpose(1, 2).flatten(2)}


def padded(lengths: list[int], width: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(0, 50, mask.shape) * mask, "attention_mask": mask}


DYNAMIC = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}


# ---- compilation -----------------------------------------------------------------------------


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


def test_training_is_offered_live_weights_only(mlp):
    names = [offer.name for offer in variants(Inductor(), observe(mlp, torch.randn(2, 128), mode="training"))]
    assert names == ["live"]


def test_repeated_blocks_are_the_outermost_layers_of_one_class():
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    assert repeated_blocks(nn.TransformerEncoder(layer, 3)) == ["layers.0", "layers.1", "layers.2"]
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_without_a_compiler_the_reason_is_given(mlp, monkeypatch):
    monkeypatch.setattr("kpt_plugin_cpu.inductor.compiler", lambda: None)
    assert "C++ compiler" in skips(Inductor(), observe(mlp, torch.randn(2, 128)))[0]


# ---- precision -------------------------------------------------------------------------------


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
        twin = _widened(SimpleNamespace(keys=kept[0]), torch.bfloat16, torch.float32)
        assert type(twin) is SimpleNamespace and twin.keys.dtype is torch.float32
    undo()


def test_bf16_needs_the_instructions_and_fp32_weights(mlp):
    x = torch.randn(2, 128)
    old = replace(PROFILE, native_dtypes=("float32",))
    assert skips(Bf16(), observe(mlp, x), old)
    assert skips(Int8(), observe(mlp, x), old)
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
    assert int(quantized.abs().max()) == 127
    assert ((quantized * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


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


# ---- layout ----------------------------------------------------------------------------------


@torch.no_grad()
def test_channels_last_reaches_the_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    (offer,) = variants(ChannelsLast(), observe(model, x))
    behaviour, space, undo = applied(ChannelsLast, model, offer)
    inside = []
    space[2].register_forward_hook(lambda module, given, output: inside.append(output))
    output = space.forward(x)
    assert inside[0].is_contiguous(memory_format=torch.channels_last)
    assert output.stride() == model(x).stride()
    assert output.view(-1).shape == (output.numel(),)
    assert relative(output, model(x)) < 1e-6
    innermost = x.contiguous(memory_format=torch.channels_last)
    assert space.forward(innermost).stride() == model(innermost).stride()
    assert behaviour.verify_applied(space)
    assert model[0].weight.is_contiguous()
    undo()
    assert skips(ChannelsLast(), observe(nn.Linear(2, 2), torch.randn(2, 2)))


# ---- shapes ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_mask_of_ones_is_dropped_and_any_other_is_kept():
    model = Encoder().eval()
    full, partial = padded([5, 5], 5), padded([5, 3], 5)
    (offer,) = variants(DropMask(), observe(model, [full, partial]))
    assert offer.touches_mask
    seen = []

    class Watched(Encoder):
        def forward(self, input_ids, attention_mask=None):
            seen.append(attention_mask is None)
            return super().forward(input_ids, attention_mask)

    watched = Watched().eval()
    watched.load_state_dict(model.state_dict())
    behaviour, space, undo = applied(DropMask, watched, offer)
    for call in (full, partial):
        torch.testing.assert_close(space.forward(**call)["hidden"], model(**call)["hidden"])
    assert seen == [True, False]
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__
    assert skips(DropMask(), observe(model, partial))


@torch.no_grad()
def test_packing_agrees_where_the_mask_is_one_and_restores_the_shape():
    model = Encoder().eval()
    call = padded([12, 3, 4, 11, 2, 1], 12)
    offers = variants(PackPadding(), observe(model, call, dynamic_shapes=DYNAMIC))
    assert offers and offers[0].touches_mask and offers[0].predicted_gain > 1.1
    behaviour, space, undo = applied(PackPadding, model, offers[0])
    for lengths, width in (([12, 3, 4, 11, 2, 1], 12), ([2, 9], 9), ([1, 1, 1, 7], 7)):
        call = padded(lengths, width)
        got, expected = space.forward(**call)["hidden"], model(**call)["hidden"]
        assert got.shape == expected.shape
        kept = call["attention_mask"].bool()
        torch.testing.assert_close(got[kept], expected[kept])
    assert behaviour.verify_applied(space)
    undo()


@torch.no_grad()
def test_left_padding_and_full_batches_go_through_whole():
    model = Encoder().eval()
    offer = variants(PackPadding(), observe(model, padded([9, 2, 2], 9), dynamic_shapes=DYNAMIC))[0]
    behaviour, space, undo = applied(PackPadding, model, offer)
    left = {name: value.flip(1) for name, value in padded([9, 2, 2], 9).items()}
    for call in (left, padded([4, 4], 4)):
        torch.testing.assert_close(space.forward(**call)["hidden"], model(**call)["hidden"])
    assert not behaviour.verify_applied(space)


class Classifier(Encoder):
    """Logits [batch, sequence, labels], and whatever ``extra`` makes of them."""

    def __init__(self, labels: int, extra=None) -> None:
        super().__init__()
        self.head = nn.Linear(64, labels)
        self.extra = extra

    def forward(self, input_ids, attention_mask=None):
        logits = self.head(super().forward(input_ids, attention_mask)["hidden"])
        return {"logits": logits, **({"extra": self.extra(logits)} if self.extra else {})}


@pytest.mark.parametrize("lengths", [[12, 12, 8, 8], [8, 8, 8, 8], [8, 12, 3, 3, 2, 8]])
@torch.no_grad()
def test_packing_tells_labels_from_positions(lengths):
    """Eight labels and groups of eight tokens: the axis of labels must not be taken for the sequence."""
    model = Classifier(labels=8).eval()
    offer = variants(PackPadding(), observe(model, padded([12, 2, 3, 1], 12), dynamic_shapes=DYNAMIC))[0]
    behaviour, space, undo = applied(PackPadding, model, offer)
    call = padded(lengths, 12)
    got, expected = space.forward(**call)["logits"], model(**call)["logits"]
    assert got.shape == expected.shape
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(got[kept], expected[kept])
    assert behaviour.split == (len(set(lengths)) > 1)


@pytest.mark.parametrize("extra", [torch.mean, lambda x: x.transpose(0, 1), lambda x: x[:, 1:]])
@torch.no_grad()
def test_outputs_that_cannot_be_joined_are_computed_whole(extra):
    model = Classifier(5, extra).eval()
    call = padded([12, 2, 3, 1], 12)
    offer = variants(PackPadding(), observe(model, call, dynamic_shapes=DYNAMIC))[0]
    behaviour, space, _ = applied(PackPadding, model, offer)
    for _ in range(2):
        torch.testing.assert_close(space.forward(**call), model(**call))
    assert (behaviour.split, behaviour.whole) == (0, 2)
    assert not behaviour.verify_applied(space)


@torch.no_grad()
def test_packing_leaves_static_axes_of_inputs_alone():
    class Scaled(Encoder):
        def forward(self, input_ids, attention_mask=None, factors=None):
            return super().forward(input_ids, attention_mask)["hidden"] * factors.prod(1)[:, None, None]

    model = Scaled().eval()
    call = {**padded([9, 2, 3, 1], 9), "factors": torch.rand(4, 9) + 0.5}
    shapes = {**DYNAMIC, "factors": {0: "batch"}}
    offer = variants(PackPadding(), observe(model, call, dynamic_shapes=shapes))[0]
    behaviour, space, _ = applied(PackPadding, model, offer)
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(space.forward(**call)[kept], model(**call)[kept])
    assert behaviour.verify_applied(space)


class Segments(nn.Module):
    """Counts, for each token, the tokens of its segment (0 is padding)."""

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        same = attention_mask[:, :, None] == attention_mask[:, None, :]
        return (same & (attention_mask != 0)[:, None, :]).sum(-1).float()


@torch.no_grad()
def test_segment_ids_are_neither_dropped_nor_packed():
    model = Segments().eval()
    full, partial = padded([6, 6], 6), padded([6, 2], 6)
    segments = {**full, "attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 2, 2]])}
    padded_segments = {**full, "attention_mask": torch.tensor([[1, 1, 2, 2, 3, 3], [1, 2, 0, 0, 0, 0]])}
    for kind, seen in ((DropMask, full), (PackPadding, partial)):
        observation = observe(model, seen, dynamic_shapes=DYNAMIC)
        _, space, _ = applied(kind, model, variants(kind(), observation)[0])
        for call in (segments, padded_segments):
            torch.testing.assert_close(space.forward(**call), model(**call))
        assert skips(kind(), observe(model, [seen, segments], dynamic_shapes=DYNAMIC))


def test_a_mask_of_what_to_ignore_is_not_taken_for_one_of_what_counts():
    class Ignores(nn.Module):
        def forward(self, x, key_padding_mask=None):
            return x

    mask = torch.zeros(2, 4, dtype=torch.bool)
    call = {"x": torch.randn(2, 4), "key_padding_mask": mask}
    assert "no input" in skips(DropMask(), observe(Ignores(), call))[0]


def test_packing_announces_the_graphs_of_groups_that_are_smaller_than_the_batch():
    """A compiler sets one up for each size that is not dynamic: groups of 2 and of 1 beside 5 rows."""
    call, lengths = padded([9, 2, 2, 2, 2], 9), {name: {1: "sequence"} for name in DYNAMIC}
    fixed = observe(Encoder().eval(), call, dynamic_shapes=lengths)
    (offer,) = variants(PackPadding(), fixed)
    assert offer.setup_seconds == 2 * compile_seconds(fixed)
    (offer,) = variants(PackPadding(), observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC))
    assert offer.setup_seconds == 0.0


def test_a_dynamic_batch_is_compiled_for_a_single_row_too():
    call, lengths = padded([9, 2, 2], 9), {name: {1: "sequence"} for name in DYNAMIC}
    one = compile_seconds(observe(Encoder().eval(), call, dynamic_shapes=lengths))
    assert compile_seconds(observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC)) == 2 * one


def test_packing_asks_for_declared_lengths_and_enough_padding():
    model = Encoder().eval()
    assert skips(PackPadding(), observe(model, padded([9, 2, 2], 9)))
    assert skips(PackPadding(), observe(model, padded([9, 9, 9], 9), dynamic_shapes=DYNAMIC))


# ---- run time --------------------------------------------------------------------------------


def test_threads_are_set_during_the_call_and_put_back(mlp):
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    seen = []
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    observation = observe(model, torch.randn(2, 4), baseline_seconds=1e-4)
    from kpt.specs import Variant

    behaviour = Threads()
    undo = behaviour.apply(model, Variant("other", {"threads": other}))
    model.forward(torch.randn(2, 4))
    assert seen == [other]
    assert torch.get_num_threads() == before
    assert behaviour.verify_applied(model)
    undo()
    crowded = replace(PROFILE, compute_units=max(before, 1))
    assert skips(Threads(), replace(observation, baseline_seconds=1.0), crowded)
