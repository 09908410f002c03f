"""Passes that are wrong only in random models, memory layouts, gradients or modes that few look at."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module as torch_module

import fingerprints
import kpt
import subtle_passes as subtle
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction.commit import Committed
from slow_models import DirectScale, SlowScale, fast_forward, net, plugin


def rule_of(model: torch.nn.Module, offered: type, *example: torch.Tensor, phase: str = "layout") -> str:
    """The rule that rejects ``offered``, or "kept"."""
    kpt.optimize(model, example, plugins=[plugin(offered, phase=phase)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    return "kept" if receipt.optimized else receipt.rejected[0].rule


# -- randomness


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_adds_noise_is_no_licence_to_be_wrong(training):
    """In fp64 it draws other noise; a reference so far from eager would allow anything."""
    example = torch.randn(32, 16)
    assert rule_of(subtle.NoisySlow().train(training), subtle.ThirtyPercent, example) == "value"
    model = optimized(subtle.NoisySlow().train(training), example, plugins=[plugin(DirectScale)])
    assert "random numbers" in kpt.report(model).baseline["note"]
    assert kpt.report(model).baseline["reference_dtype"] == "float32"


def test_noise_of_python_and_numpy_is_the_same_for_all():
    example = torch.randn(32, 16)
    assert rule_of(subtle.PythonsNoise().eval(), subtle.ThirtyPercent, example) == "value"
    assert rule_of(subtle.PythonsNoise().eval(), DirectScale, example) == "kept"


def test_a_model_that_is_another_in_fp64_is_judged_against_itself():
    example, model = torch.randn(32, 16), subtle.AsksForItsDtype().eval()
    assert rule_of(model, subtle.ThirtyPercent, example) == "value"
    assert rule_of(model, DirectScale, example) == "kept"
    assert "something else in fp64 (output is off by 50%)" in kpt.report(model).baseline["note"]


# -- levels


def test_what_quantises_is_no_step_of_level_production():
    model, x = SlowScale().eval(), torch.randn(32, 16)
    offered = [plugin(subtle.FourPercentInFp8, level="production")]
    kpt.optimize(model, x, plugins=offered, budget=20.0, cache=False)
    assert kpt.report(model).skipped[0]["reason"] == "needs level='aggressive'"
    optimized(model, x, plugins=offered, level="aggressive")


# -- memory layouts


def test_a_pass_serves_the_strides_that_it_was_proved_on_and_no_others():
    model = optimized(SlowScale().eval(), torch.randn(16, 32).t(), plugins=[plugin(subtle.ColumnMajor)])
    with torch.no_grad():
        for x, fast in ((torch.randn(16, 32).t(), 1), (torch.randn(32, 32)[:, ::2], 0)):
            before = fast_calls(model)
            assert torch.equal(model(x), fast_forward(model, x))
            assert fast_calls(model) == before + fast
    assert any("strides" in reason for reason in fallbacks(model))


def test_where_sizes_are_dynamic_the_kind_of_the_layout_decides():
    shapes = {"x": {0: "batch"}}
    model = optimized(
        SlowScale().eval(), torch.randn(32, 24)[:, :16], plugins=[plugin(DirectScale)], dynamic_shapes=shapes
    )
    with torch.no_grad():
        model(torch.randn(8, 20)[:, :16])  # rows of a wider tensor, as the example's
        assert fast_calls(model) == 1
        model(torch.randn(16, 8).t())
        model(torch.randn(8, 16, 1).expand(8, 16, 2)[..., 0])
        assert fast_calls(model) == 1


def test_both_bounds_of_every_dimension_are_judged():
    shapes = {"x": {0: ("batch", 1, 8), 1: ("sequence", 1, 64)}}
    offered = [plugin(subtle.WrongForLongSequences)]
    model = SlowScale().eval()
    kpt.optimize(
        model, torch.randn(4, 16, 16), plugins=offered, cache=False, budget=20.0, dynamic_shapes=shapes
    )
    assert [entry.rule for entry in kpt.report(model).rejected] == ["size"]


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * mask.view(*mask.shape, *(1,) * (x.dim() - mask.dim()))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 8, dtype=torch.int64),
        torch.ones(4, 8, dtype=torch.bool),
        torch.ones(4, 8),
        torch.ones(4),
        torch.ones(4, dtype=torch.bool),
        torch.ones((), dtype=torch.bool),
        torch.ones(4, 1),
    ],
    ids=["integers", "flags", "floats", "a row", "flags of rows", "one flag", "a column"],
)
def test_a_pass_that_leaves_out_a_mask_is_found_though_the_examples_mask_nothing(mask):
    model = Masked().eval()
    given = {"x": torch.randn(4, 8, 16), "mask": mask}
    kpt.optimize(model, given, plugins=[plugin(subtle.LeavesOut)], cache=False, budget=20.0)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["mask"]
    optimized(model, given, plugins=[plugin(DirectScale)])


class InFours(torch.nn.Module):
    """Takes four rows of x for each of y, and no other number."""

    def __init__(self, factors: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.factors = factors

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) != 4 * len(y) or len(y) not in self.factors:
            raise ValueError("four rows of x for each of y are expected")
        return self.slow(x).view(len(y), 4, 16) * y[:, None, None]


def test_sizes_that_only_fit_together_are_judged_in_proportion():
    shapes, calls = {"x": {0: "rows"}, "y": {0: "groups"}}, (torch.randn(16, 16), torch.randn(4))
    model = kpt.optimize(
        InFours().eval(),
        calls,
        plugins=[plugin(subtle.RightForSixteenRows)],
        cache=False,
        budget=20.0,
        dynamic_shapes=shapes,
    )
    assert [entry.rule for entry in kpt.report(model).rejected] == ["size"]
    optimized(model, calls, plugins=[plugin(DirectScale)], dynamic_shapes=shapes)
    assert not kpt.report(model).notes
    model = InFours((4,)).eval()
    optimized(model, calls, plugins=[plugin(DirectScale)], dynamic_shapes=shapes)
    assert "only the examples' sizes were judged" in " ".join(kpt.report(model).notes)


def test_a_conjugate_is_not_taken_for_its_tensor():
    example = torch.randn(32, 16, dtype=torch.complex64)
    model = optimized(subtle.ComplexSlow().eval(), example, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        assert torch.equal(model(example.conj()), subtle.ComplexSlow.forward(model, example.conj()))
        assert fast_calls(model) == 0
        model(example)
    assert fast_calls(model) == 1


def test_inputs_that_share_memory_are_no_others_where_one_is_written_to():
    model, x = subtle.WritesItsInput().eval(), torch.randn(32, 16)
    optimized(model, (x, x.clone()), plugins=[plugin(subtle.CapturedAsFunction, phase="compile")])
    rows = torch.randn(33, 16)
    with torch.no_grad():
        for _ in range(2):
            model(x.clone(), x.clone())
        for first, second in ((slice(0, 32), slice(0, 32)), (slice(0, 32), slice(1, 33))):
            mine, own = rows.clone(), rows.clone()
            assert torch.equal(
                model(mine[first], mine[second]), type(model).forward(model, own[first], own[second])
            )
            assert torch.equal(mine, own)
    assert fast_calls(model) == 2
    assert sum(fallbacks(model).values()) == 2


# -- gradients


def test_the_gradient_of_an_input_is_judged():
    example = torch.randn(32, 16).requires_grad_()
    assert rule_of(net(training=True), subtle.LosesInputGradient, example) == "gradient"
    model = optimized(net(training=True), example, plugins=[plugin(DirectScale)])
    x = torch.randn(32, 16).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and fast_calls(model) == 1


def test_an_input_whose_gradient_was_not_judged_is_not_served_in_training():
    model = optimized(net(training=True), torch.randn(32, 16), plugins=[plugin(subtle.LosesInputGradient)])
    x = torch.randn(32, 16).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and fast_calls(model) == 0
    assert fallbacks(model) == {"'x' requires a gradient; proven without": 1}


def test_outputs_beside_the_loss_keep_their_gradients():
    example = torch.randn(32, 16)
    assert rule_of(subtle.WithLoss().train(), subtle.DetachesLogits, example) == "gradient"
    assert rule_of(subtle.WithLoss().train(), DirectScale, example) == "kept"


@pytest.mark.parametrize("training", [False, True])
def test_models_with_complex_weights_are_optimised(training):
    example = torch.randn(32, 16, dtype=torch.complex64)
    assert rule_of(subtle.ComplexSlow().train(training), DirectScale, example) == "kept"
    assert rule_of(subtle.ComplexSlow().train(training), subtle.ThirtyPercent, example) in (
        "value",
        "gradient",
    )


def test_a_backward_after_a_switch_of_the_mode_is_that_of_the_forward():
    model, x = net(dropout=0.5), torch.randn(32, 16)
    expected = torch.autograd.grad(model(x).sum(), model.first.weight)[0]
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])
    output, statistics = model(x), model.norm.running_mean.clone()
    assert fast_calls(model) == 1
    model.train()
    torch.testing.assert_close(torch.autograd.grad(output.sum(), model.first.weight)[0], expected)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.norm.running_mean, statistics)


def test_a_backward_after_weights_were_exchanged_says_so():
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    output, weight = model(torch.randn(32, 16)), model.first.weight
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="replaced since the forward"):
        torch.autograd.grad(output.sum(), weight)


# -- hooks


def test_hooks_of_parameters_do_not_fire_in_a_run_and_fire_after_it():
    model, fired = net(training=True), []
    handle = model.first.weight.register_hook(lambda grad: fired.append("hook"))
    model.first.bias.register_post_accumulate_grad_hook(lambda parameter: fired.append("accumulated"))
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])
    assert fired == []
    model(torch.randn(32, 16)).sum().backward()
    assert sorted(fired) == ["accumulated", "hook"]
    assert fast_calls(model) == 1
    handle.remove()
    model(torch.randn(32, 16)).sum().backward()
    assert fired.count("hook") == 1


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules_see_every_module(kind):
    fired = []
    register = getattr(torch_module, f"register_module_{kind}")
    x, model = torch.randn(32, 16), net(training=True)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with register(lambda module, *rest: fired.append(type(module).__name__)):
        model(x).sum().backward()
        assert "Linear" in fired and fast_calls(model) == 0
        fired.clear()
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], cache=False)
        assert fired == []
        assert "global module hook" in kpt.report(model).reason


def test_a_plan_that_writes_to_weights_only_once_it_serves_is_taken_back(monkeypatch):
    time = Committed.time

    def serving(self, *args):
        monkeypatch.setattr(subtle.WritesLate, "serves", True)
        return time(self, *args)

    monkeypatch.setattr(Committed, "time", serving)
    model = net()
    before = fingerprints.of_model(model)
    assert rule_of(model, subtle.WritesLate, torch.randn(32, 16)) == "parameter-modified"
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []


# -- configurations and attributes


def test_a_configuration_that_a_pass_changes_is_put_back():
    model, x = subtle.Configured().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.EditsConfig, x) == "parameter-modified"
    assert "model.settings: attribute 'fused' added" in kpt.report(model).rejected[0].reason
    assert vars(model.settings) == {"gain": 2.0, "inner": model.settings.inner}
    assert vars(model.settings.inner) == {"names": ["a"], "flag": True}


def test_a_constant_of_an_object_that_changes_is_no_constant_of_the_plan():
    model, x = subtle.Configured().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(subtle.Captured, phase="compile")])
    model.settings.gain = 3.0
    with torch.no_grad():
        assert torch.equal(model(x), fast_forward(model.slow, x) * 3.0)
        assert fast_calls(model) == 0
        model.settings.gain = 2.0
        assert torch.equal(model(x), fast_forward(model.slow, x) * 2.0)
    assert fast_calls(model) == 1


def test_an_attribute_that_only_a_function_reads_is_watched():
    model, x = subtle.ScaledByAFunction().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(subtle.Captured, phase="compile")])
    with torch.no_grad():
        model(x)
        model.gain = 3.0
        assert torch.equal(model(x), fast_forward(model.slow, x) * 3.0)
        assert fallbacks(model) == {"the attribute 'gain' of the model changed": 1}
        model.gain = 2.0
        model(x)
    assert fast_calls(model) == 2


def test_reading_attributes_brings_no_comparison():
    model = optimized(subtle.ScaledByAFunction().eval(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    structure = kpt.transaction.dispatch.plan_of(model).watch.structure
    structure.changed()
    assert model.gain == 2.0 and model.slow.weight is not None and not hasattr(model, "absent")
    assert not structure.unsure
    model.gain = 2.0
    assert structure.unsure


def test_what_torch_and_kpt_keep_in_a_module_is_no_configuration():
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    watch = kpt.transaction.dispatch.plan_of(model).watch
    assert all(any(state is vars(m) for m in model.modules()) for state in watch._states)


def test_what_eager_itself_counts_is_blamed_on_nobody_and_put_back():
    model, x = subtle.CountsInAnObject().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    assert kpt.report(model).notes == []


def test_what_is_kept_in_slots_is_put_back():
    model, x = subtle.Slotted().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.EditsSlots, x) == "parameter-modified"
    assert "model.settings: attribute '_SlottedConfig__gain' replaced" in kpt.report(model).rejected[0].reason
    assert (model.settings.gain, model.settings.names, model.settings.calls) == (2.0, ["a"], 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "factor", 4.0),
        lambda m: setattr(m, "factor", -0.0),
        lambda m: setattr(m, "factor", 0),
        lambda m: m.settings.amplify(3.0),
    ],
    ids=["of the module", "its sign", "its type", "private, of an object"],
)
def test_a_constant_in_a_slot_that_changes_is_no_constant_of_the_plan(change):
    model, x = subtle.Slotted().eval(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        model(x)
        assert fast_calls(model) == 1
        change(model)
        result = model(x)
        assert fast_calls(model) == 1
        kpt.restore(model)
        assert torch.equal(result, model(x))


# -- copies, memory, order of memory


@pytest.mark.parametrize("offered", [subtle.SaysNothingOfCopies, subtle.HidesCopies, subtle.CopiesInArrays])
def test_copies_of_weights_are_watched_though_nobody_was_told(offered):
    model, x = net(), torch.randn(32, 16)
    optimized(model, x, plugins=[plugin(offered)])
    assert kpt.report(model).watched_tensors > 0
    with torch.no_grad():
        model(x)
        model.slow.weight.mul_(2.0)
        result = model(x)
        assert fast_calls(model) == 1
        kpt.restore(model)
        assert torch.equal(result, model(x))


@pytest.mark.parametrize("offered", [DirectScale, subtle.LiveArrays])
def test_an_honest_plan_without_copies_watches_no_weights(offered):
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(offered)])
    assert kpt.report(model).watched_tensors == 0


@pytest.mark.parametrize("offered", [subtle.Remembers, subtle.RemembersMemory])
def test_results_that_are_remembered_by_tensor_or_memory_are_a_replay(offered):
    model = net()
    assert rule_of(model, offered, torch.randn(32, 16)) == "replay"
    assert "same tensors with new values" in kpt.report(model).rejected[0].reason


class WritesItsList(torch.nn.Module):
    """Appends to a list that it is given, or puts another tensor there."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.slow, self.way = SlowScale(16), way

    def forward(self, x: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "append":
            states.append(states[0] + 1.0)
        else:
            states[0] = states[0] + 1.0
        return self.slow(x) + states[-1]


@pytest.mark.parametrize("way", ["append", "exchange"])
def test_a_model_that_changes_a_list_it_is_given_is_no_replay(way):
    given = (torch.randn(32, 16), [torch.randn(16)])
    optimized(WritesItsList(way).eval(), given, plugins=[plugin(DirectScale)])
    assert len(given[1]) == 1
    assert rule_of(WritesItsList(way).eval(), subtle.ThirtyPercent, *given) == "value"


@pytest.mark.parametrize("way", ["an array", "a number of NumPy's", "an object"])
def test_outputs_that_are_no_tensors_are_judged(way):
    model = subtle.Handover(way).eval()
    assert rule_of(model, subtle.ThirtyPercent, torch.randn(32, 16)) == "value"
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])


@pytest.mark.parametrize("way", ["a generator", "a coroutine"])
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_what_is_computed_after_the_call_is_left_alone(way):
    model = kpt.optimize(subtle.Handover(way).eval(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    assert "is computed after the call" in kpt.report(model).reason


@pytest.mark.parametrize("scale", [(1.0, 1.0), (1.0, 2.0)])
def test_calls_that_differ_in_more_than_values_are_not_mixed(scale):
    x = torch.randn(32, 16)
    masks = (None, torch.rand(16))
    calls = [{"x": x + n, "mask": masks[n], "scale": scale[n]} for n in range(2)]
    model = subtle.Masked().eval()
    kpt.optimize(model, calls, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert kpt.report(model).optimized, [entry.reason for entry in kpt.report(model).rejected]


@pytest.mark.parametrize(
    ("offered", "rule", "text"),
    [
        (subtle.RingOfBuffers, "replay", "output is held after the call"),
        (subtle.KeepsResults, "replay", "output is held after the call"),
        (subtle.ReturnsASubclass, "structure", "output is a OwnTensors"),
        (subtle.ReturnsInferenceTensors, "structure", "output was made in inference mode"),
        (subtle.KeepsHistory, "gradient", "output requires a gradient"),
    ],
)
def test_outputs_that_are_not_the_callers_own_are_rejected(offered, rule, text):
    model = net()
    assert rule_of(model, offered, torch.randn(32, 16)) == rule
    assert text in kpt.report(model).rejected[0].reason


def test_an_output_that_cannot_be_viewed_is_rejected():
    model, x = SlowScale().eval(), torch.randn(32, 16)
    assert rule_of(model, subtle.Transposes, x) == "stride"
    assert rule_of(subtle.Configured().eval(), DirectScale, x.t().contiguous().t()) == "kept"
