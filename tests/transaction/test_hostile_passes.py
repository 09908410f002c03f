"""Passes that are fast and wrong: each is rejected by the rule named here and leaves no trace."""

from __future__ import annotations

import pytest
import torch

import fingerprints
import hostile_passes as hostile
import kpt
import slow_models
from fingerprints import operations, optimized
from kpt.judge.state import untouched
from kpt.transaction.api import request_of
from slow_models import DirectScale, net, plugin

BATCH = {"x": {0: "batch"}}
# (the pass, the rule, whether the model trains, further options)
CASES = [
    (hostile.OnePercent, "value", False, {}),
    (hostile.OnePercent, "value", True, {}),
    (hostile.NotANumber, "nan", False, {}),
    (hostile.WrongGradient, "gradient", True, {}),
    (hostile.NoGradient, "gradient", True, {}),
    (hostile.EvenOnly, "size", False, {"dynamic_shapes": BATCH}),
    (hostile.EvenOnly, "size", True, {"dynamic_shapes": BATCH}),
    (hostile.ModifiesInput, "input-modified", False, {}),
    (hostile.ModifiesInput, "input-modified", True, {}),
    (hostile.ReplaysLast, "value", False, {}),
    (hostile.OneBuffer, "replay", False, {}),
    (hostile.LeavesUnwritten, "unwritten", False, {}),
    (hostile.LeavesUnwritten, "unwritten", True, {}),
    (hostile.WritesParameter, "parameter-modified", False, {}),
    (hostile.WritesData, "parameter-modified", False, {}),
    (hostile.WritesData, "parameter-modified", True, {}),
    (hostile.ScalesWeights, "parameter-modified", False, {}),
    (hostile.ReplacesGradient, "parameter-modified", False, {}),
    (hostile.EditsUsersModel, "parameter-modified", False, {}),
    (hostile.HooksGradients, "parameter-modified", False, {}),
    (hostile.ForgetsBuffers, "global-state", True, {}),
    (hostile.MovesBuffersTwice, "value", True, {}),
    (hostile.ChangesGlobals, "global-state", False, {}),
    (hostile.ChangesLessKnownGlobals, "global-state", False, {}),
    (hostile.PatchesClass, "global-state", False, {}),
    (hostile.PatchesBase, "global-state", False, {}),
    (hostile.PatchesLibrary, "global-state", False, {}),
    (hostile.PatchesTorch, "global-state", False, {}),
    (hostile.ReseedsRandom, "global-state", False, {}),
    (hostile.ChangesGlobalsOnApply, "failed", False, {}),
    (hostile.WrongAndUndoRaises, "value", False, {}),
    (hostile.ApplyRaises, "failed", False, {}),
    (hostile.ApplyExits, "failed", False, {}),
    (hostile.ForwardExits, "failed", False, {}),
    (hostile.ApplyUnspeakable, "failed", False, {}),
    (hostile.ForwardUnspeakable, "failed", False, {}),
    (hostile.NoUndo, "failed", False, {}),
    (hostile.NoEffect, "no-effect", False, {}),
    (hostile.VerifyRaises, "failed", False, {}),
    (hostile.VerifyIsAmbiguous, "failed", False, {}),
    (hostile.MissesRaise, "failed", False, {}),
    (hostile.MissesAreANumber, "failed", False, {}),
    (hostile.Slower, "slower", False, {}),
    (hostile.OutOfMemory, "memory", False, {}),
    (hostile.HostMemory, "memory", True, {}),
]


def _name(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else None


def trained_net(training: bool) -> slow_models.Net:
    """A model in mid-life: gradients, moved running statistics, a hook, attributes of its own."""
    model = net(training=True)
    model(torch.randn(8, 16)).sum().backward()
    model.history = [1, 2]
    model.register_forward_hook(lambda *args: None)
    return model.train(training)


def rejected_by(model: torch.nn.Module, offered: type, **options: object) -> kpt.Receipt:
    """Optimise with one hostile pass; everything has to be as it was."""
    model_before, process_before = fingerprints.of_model(model), fingerprints.of_process()
    result = kpt.optimize(
        model, torch.randn(32, 16), plugins=[plugin(offered)], budget=20.0, cache=False, **options
    )
    process_before["torch random"] = fingerprints.bits(torch.get_rng_state())  # the example was drawn
    assert result is model
    assert fingerprints.differences(process_before, fingerprints.of_process()) == []
    assert fingerprints.differences(model_before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []
    receipt = kpt.report(model)
    assert not receipt.optimized and receipt.speedup == 1.0
    return receipt


@pytest.mark.parametrize(("offered", "rule", "training", "options"), CASES, ids=_name)
def test_a_hostile_pass_is_rejected_by_its_rule_and_leaves_no_trace(offered, rule, training, options):
    receipt = rejected_by(trained_net(training), offered, **options)
    assert [entry.rule for entry in receipt.rejected] == [rule], receipt.rejected
    assert receipt.rejected[0].name == f"{offered.__name__}:direct"
    assert receipt.rejected[0].reason


def test_random_states_are_not_moved_by_a_run():
    model = trained_net(True)
    example = torch.randn(32, 16)
    before = fingerprints.of_process()
    kpt.optimize(model, example, plugins=[plugin(hostile.ReseedsRandom)], budget=20.0, cache=False)
    assert fingerprints.differences(before, fingerprints.of_process()) == []
    kpt.restore(optimized(model, example, plugins=[plugin(DirectScale)]))  # whose watch listens to torch
    assert fingerprints.differences(before, fingerprints.of_process()) == []


def test_a_pass_that_takes_ctrl_c_and_the_collector_gives_them_back():
    before, example = fingerprints.of_process(), torch.randn(32, 16)
    optimized(net(), example, plugins=[plugin(hostile.TakesCtrlC)])
    assert {"signals", "garbage collector"}.isdisjoint(
        fingerprints.differences(before, fingerprints.of_process())
    )


@pytest.mark.parametrize("training", [False, True])
def test_the_honest_pass_is_kept(training):
    """The control: without it, the rejections above would prove nothing."""
    model = optimized(trained_net(training), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert receipt.speedup_low > 1.0


UNABLE_TO_RUN = {
    hostile.ChangesGlobalsOnApply,
    hostile.ApplyRaises,
    hostile.ApplyExits,
    hostile.ForwardExits,
    hostile.ApplyUnspeakable,
    hostile.ForwardUnspeakable,
    hostile.OutOfMemory,
    hostile.HostMemory,
    hostile.Slower,
    hostile.EditsUsersModel,
    hostile.PatchesClass,
    hostile.PatchesBase,
    hostile.PatchesLibrary,
    hostile.PatchesTorch,
}


@pytest.mark.parametrize("offered", sorted({c[0] for c in CASES} - UNABLE_TO_RUN, key=_name), ids=_name)
def test_the_wrong_ones_do_much_less_work_than_eager(offered):
    model = net()
    example = torch.randn(32, 16)
    eager = operations(model, example)
    behaviour = offered()
    with untouched():  # some of them leave the process changed
        behaviour.apply(model, behaviour.variant)
        assert operations(model, example) < eager / 4


@pytest.mark.parametrize(
    ("offered", "text"),
    [
        (hostile.ProposeRaises, "propose is broken"),
        (hostile.ProposeExits, "SystemExit"),
        (hostile.ProposeUnspeakable, "UnspeakableError: (its message cannot be shown)"),
        (hostile.ProposesText, "expected Variant or Skip"),
        (hostile.ProposesTensor, "must be JSON values"),
        (hostile.ProposesNone, "nothing to offer"),
        (hostile.ProposesOne, "expected an iterable"),
        (hostile.ProposesEndlessly, "is it endless?"),
        (hostile.ProposesNothingMuch, "reason=None"),
        (hostile.GainIsText, "predicted_gain='large'"),
        (hostile.GainIsNoNumber, "predicted_gain=nan"),
        (hostile.ParameterIsNoNumber, "must be JSON values"),
        (hostile.NameIsUnprintable, r"name='direct\x1b[2J' is not a name"),
        (hostile.NameIsEmpty, "Variant: name='' is not a name"),
        (hostile.SetupIsNone, "setup_seconds=None"),
        (hostile.LevelIsUnknown, "level='fast'"),
        (hostile.NameIsNumber, "name=5"),
        (hostile.SitesAreText, "write ('slow',)"),
        (hostile.DtypeIsNickname, "did you mean 'bfloat16'?"),
    ],
    ids=_name,
)
def test_a_proposal_that_fails_loses_itself_only(offered, text):
    receipt = rejected_by(trained_net(False), offered)
    assert [skip["name"] for skip in receipt.skipped] == [offered.__name__]
    assert text in receipt.skipped[0]["reason"]
    model = optimized(trained_net(False), torch.randn(32, 16), plugins=[plugin(offered, DirectScale)])
    assert [entry.name for entry in kpt.report(model).accepted] == ["DirectScale:direct"]


def test_the_wrong_pass_is_named_and_the_right_one_kept_beside_it():
    model = optimized(
        trained_net(False),
        torch.randn(32, 16),
        plugins=[plugin(hostile.OnePercent, DirectScale, hostile.NoEffect)],
    )
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    rules = {entry.name: entry.rule for entry in receipt.rejected}
    assert rules["OnePercent:direct"] == "value"


def test_examples_that_a_pass_writes_to_are_its_own():
    example = torch.randn(32, 16)
    before = example.clone()
    model = optimized(trained_net(False), example, plugins=[plugin(hostile.WritesToExamples)])
    assert torch.equal(example, before)
    assert torch.equal(request_of(model).examples[0].kwargs["x"], before), "kpt.refresh and kpt.save use them"


def test_a_pass_that_does_not_say_whether_it_was_applied_is_blamed_alone():
    offered = [plugin(hostile.VerifyIsAmbiguous, slow_models.DirectScale)]
    receipt = kpt.report(optimized(trained_net(False), torch.randn(32, 16), plugins=offered))
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert "verify_applied raised RuntimeError" in receipt.rejected[0].reason


@pytest.mark.parametrize(
    ("offered", "said"),
    [(hostile.UndoRaises, "undo is broken"), (hostile.UndoUnspeakable, "cannot be shown")],
)
def test_an_undo_that_raises_harms_nobody_and_is_noted(offered, said):
    model = trained_net(False)
    before, example = fingerprints.of_model(model), torch.randn(32, 16)
    expected = model(example)
    optimized(model, example, plugins=[plugin(offered)])
    kpt.restore(model)
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert torch.equal(model(example), expected)
    assert any(said in note for note in kpt.report(model).notes)


def test_a_pass_for_contiguous_inputs_never_sees_others():
    """Proven on contiguous inputs, it serves those only; proven on strided ones, it is rejected."""
    model = slow_models.SlowScale().eval()
    example = torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(hostile.ContiguousOnly)])
    strided = torch.randn(16, 32).t()
    with torch.no_grad():
        assert torch.equal(model(strided), slow_models.fast_forward(model, strided))
    assert fingerprints.fast_calls(model) == 0
    assert any("contiguous" in reason for reason in fingerprints.fallbacks(model))
    kpt.optimize(model, strided, plugins=[plugin(hostile.ContiguousOnly)], budget=20.0, cache=False)
    (entry,) = kpt.report(model).rejected
    assert entry.rule in ("value", "size")


class OfNothing(slow_models.SlowScale):
    """Divides by what is zero, or by as good as zero, on the examples."""

    def __init__(self, factor: float, several: bool) -> None:
        super().__init__(16)
        self.factor = factor
        self.several = several

    def forward(self, x):
        y = slow_models.SlowScale.forward(self, x) * self.factor
        return (x, y) if self.several else y


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_examples_of_which_a_model_computes_no_numbers_prove_nothing(factor, several):
    """An error of one per cent of NaN is NaN: a wrong pass would serve calls that give numbers."""
    model = torch.nn.Sequential(OfNothing(factor, several)).eval()
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(hostile.OnePercent)], cache=False, budget=20.0)
    receipt = kpt.report(model)
    assert not receipt.optimized and not receipt.searched
    assert "is NaN or infinite in every element" in receipt.reason and "pass examples" in receipt.reason
    assert fingerprints.ours(model) == []


@pytest.mark.parametrize("options", [{}, {"dynamic_shapes": BATCH}])
def test_examples_without_rows_are_no_licence_to_be_wrong(options):
    model = net()
    kpt.optimize(model, torch.randn(0, 16), plugins=[plugin(hostile.OnePercent)], cache=False, **options)
    assert "hold no element on any example" in kpt.report(model).reason
    # One of several may be empty.
    examples = [torch.randn(0, 16), torch.randn(32, 16)]
    kpt.optimize(model, examples, plugins=[plugin(hostile.OnePercent)], cache=False, **options)
    (entry,) = kpt.report(model).rejected
    assert entry.rule in ("value", "size")


def test_one_example_with_numbers_is_enough():
    model = torch.nn.Sequential(slow_models.SlowScale(16)).eval()
    examples = [torch.full((32, 16), float("nan")), torch.randn(32, 16)]
    optimized(model, examples, plugins=[plugin(DirectScale)])
