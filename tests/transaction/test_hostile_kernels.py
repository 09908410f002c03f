"""Kernels that are fast and wrong: each is rejected by the rule named here and leaves no trace."""

from __future__ import annotations

import pytest
import torch

import fingerprints
import inline_models
import kpt
import own_op
import slow_kernels
from fingerprints import operations, optimized
from kpt import ops
from kpt.judge.calls import Call
from kpt.kernels import KernelBehaviour
from kpt.specs import KernelSpec, Variant
from slow_models import plugin

CASES = [
    ("one_percent", "value", False),
    ("one_percent", "value", True),
    ("nan", "nan", False),
    ("overflows", "nan", False),
    ("wrong_gradient", "gradient", True),
    ("contiguous_only", "stride", False),
    ("even_rows_only", "size", False),
    ("even_rows_only", "size", True),
    ("modifies_input", "input-modified", False),
    ("replays", "replay", False),
    ("replays", "replay", True),
    ("leaves_unwritten", "unwritten", False),
    ("leaves_unwritten", "unwritten", True),
    ("slower", "slower", False),
    ("slower", "slower", True),
    ("raises", "error", False),
    ("exits", "error", False),
]


def offered(name: str, **options: object) -> object:
    spec = {"backward": True, "predicted_gain": 3.0, **options}
    return plugin(
        kernels=[KernelSpec(op="rms_norm", name=name, entry=f"slow_kernels:{name}", **spec)]  # type: ignore[arg-type]
    )


def norm_net(training: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = slow_kernels.NormNet().train()
    model(torch.randn(8, 16)).sum().backward()
    return model.train(training)


@pytest.mark.parametrize(("name", "rule", "training"), CASES)
def test_a_hostile_kernel_is_rejected_by_its_rule_and_leaves_no_trace(name, rule, training):
    model, example = norm_net(training), torch.randn(64, 16)
    slow_kernels.replays.last.clear()
    model_before, process_before = fingerprints.of_model(model), fingerprints.of_process()
    result = kpt.optimize(model, example, plugins=[offered(name)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert result is model and not receipt.optimized
    assert [(entry.name, entry.rule) for entry in receipt.rejected] == [(f"rms_norm/{name}", rule)]
    assert fingerprints.differences(process_before, fingerprints.of_process()) == []
    assert fingerprints.differences(model_before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []


@pytest.mark.parametrize("name", sorted({name for name, *_ in CASES} - {"slower", "raises", "exits"}))
def test_the_wrong_ones_do_much_less_work_than_eager(name):
    """In the very place where a plan would put them, with what dispatches them."""
    model, example = norm_net(False), torch.randn(64, 16)
    eager = operations(model, example)
    slow_kernels.replays.last.clear()
    recognition = ops.recognise(model, [Call((example,), {})])
    sites = tuple(site for site in recognition.sites if site.op == "rms_norm")
    behaviour = KernelBehaviour(KernelSpec("rms_norm", name, f"slow_kernels:{name}"), sites)
    undo = behaviour.apply(model, Variant(name))
    assert operations(model, example) < eager / 4
    assert behaviour.verify_applied(model)
    undo()
    assert operations(model, example) == eager


def test_a_kernel_is_judged_on_every_kind_of_site_that_it_would_serve():
    model = slow_kernels.FiveWidths().eval()
    offer = offered("contiguous_only_when_wide")
    kpt.optimize(model, torch.randn(64, 40), plugins=[offer], budget=60.0, cache=False)
    (entry,) = kpt.report(model).rejected
    assert entry.rule == "stride"


def test_a_kernel_serves_no_kind_of_site_that_it_was_not_judged_on_in_time():
    """It hangs on the fourth of five kinds; receipt and recipe say where it does not serve."""
    example, kept = torch.randn(64, 40), []
    for time in ("first", "second"):
        model = slow_kernels.FiveWidths().eval()
        expected = model(example)
        slow_kernels.widths.clear()
        kpt.optimize(model, example, plugins=[offered("hangs_when_wide")], budget=30.0)
        receipt = kpt.report(model)
        kept.append([(entry.name, entry.reason) for entry in receipt.accepted])
        assert receipt.searched is (time == "first"), receipt
        assert receipt.optimized, receipt
        torch.testing.assert_close(model(example), expected)
        assert kpt.report(model).calls["optimized"] == 1
        assert 16 in slow_kernels.widths and (time == "first" or max(slow_kernels.widths) < 36)
    assert kept[0] == kept[1]
    ((name, reason),) = kept[0]
    assert name == "rms_norm/hangs_when_wide"
    assert "not judged in time, and left alone: norms.6, norms.7, norms.8" in reason


@pytest.mark.parametrize("training", [False, True])
def test_the_right_kernel_is_kept(training):
    model = optimized(norm_net(training), torch.randn(64, 16), plugins=[offered("right")])
    assert [entry.name for entry in kpt.report(model).accepted] == ["rms_norm/right"]


def test_a_kernel_that_is_right_forward_only_may_serve_inference():
    model, example = norm_net(False), torch.randn(64, 16)
    expected = torch.autograd.grad(model(example).sum(), list(model.parameters()))
    optimized(model, example, plugins=[offered("wrong_gradient")])
    found = torch.autograd.grad(model(example).sum(), list(model.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_a_kernel_without_a_backward_is_not_tried_in_training():
    model = norm_net(True)
    kpt.optimize(model, torch.randn(64, 16), plugins=[offered("right", backward=False)], budget=20.0)
    assert [skip["reason"] for skip in kpt.report(model).skipped] == ["has no backward"]


def test_a_kernel_of_an_op_that_nobody_knows_is_told_the_nearest():
    spec = KernelSpec(op="rmsnorm", name="mistyped", entry="slow_kernels:right")
    model = kpt.optimize(norm_net(False), torch.randn(64, 16), plugins=[plugin(kernels=[spec])], budget=20.0)
    reasons = [skip["reason"] for skip in kpt.report(model).skipped]
    assert reasons == ["there is no op 'rmsnorm'; did you mean 'rms_norm'?"]


def test_of_many_kernels_only_the_right_one_is_kept():
    names = ["one_percent", "nan", "contiguous_only", "right", "leaves_unwritten"]
    specs = [
        KernelSpec(op="rms_norm", name=name, entry=f"slow_kernels:{name}", backward=True, predicted_gain=3.0)
        for name in names
    ]
    model = optimized(norm_net(False), torch.randn(64, 16), plugins=[plugin(kernels=specs)])
    assert [entry.name for entry in kpt.report(model).accepted] == ["rms_norm/right"]


def test_a_kernel_of_an_op_that_its_own_plugin_defines_is_judged_and_kept():
    """Reference and recogniser come from the plugin; a wrong kernel of the op is rejected by its values."""
    import own_op
    from kpt.specs import OpSpec

    op = OpSpec("scaled_tanh", "(x, weight) -> y", "own_op:scaled_tanh", "own_op:Recogniser")

    def offering(entry: str) -> object:
        spec = KernelSpec("scaled_tanh", "mine", f"own_op:{entry}", backward=True, predicted_gain=3.0)
        return plugin(ops=[op], kernels=[spec])

    torch.manual_seed(0)
    model = torch.nn.Sequential(own_op.SlowScaledTanh(), torch.nn.Linear(16, 16)).eval()
    model = optimized(model, torch.randn(64, 16), plugins=[offering("scaled_tanh")])
    assert [entry.name for entry in kpt.report(model).accepted] == ["scaled_tanh/mine"]
    kpt.restore(model)
    own_op.off = lambda x, weight: own_op.scaled_tanh(x, weight) * 1.01
    kpt.optimize(model, torch.randn(64, 16), plugins=[offering("off")], budget=20.0, cache=False)
    assert [(e.name, e.rule) for e in kpt.report(model).rejected] == [("scaled_tanh/mine", "value")]


def test_a_function_that_is_given_its_module_is_judged_and_served():
    """As transformers' attention functions are: without the module, the judge could not call the site."""
    torch.manual_seed(0)
    model, example = own_op.AttendsByFunction().eval(), torch.randn(2, 48, 16)
    expected = model(example)
    kernel = inline_models.kernel("attention")
    kpt.optimize(model, example, plugins=[plugin(kernels=[kernel])], budget=30.0, cache=False)
    receipt = kpt.report(model)
    assert {(site["op"], site["kind"]) for site in receipt.sites} >= {("attention", "function")}, receipt
    assert [entry.name for entry in receipt.accepted] == ["attention/toy"], receipt.rejected
    torch.testing.assert_close(model(example), expected, rtol=1e-4, atol=1e-5)
    wrong = inline_models.kernel("attention", "wrong_attention")
    kpt.optimize(model, example, plugins=[plugin(kernels=[wrong])], budget=30.0, cache=False)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["value"]


def test_a_loss_that_takes_numbers_beside_its_tensors_is_judged(monkeypatch):
    """The gate calls the site as the model does: with its plain arguments, and labels of every class."""
    import own_op

    seen: set[int] = set()

    def loss(logits, target, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        seen.update(target.flatten().tolist())
        return torch.nn.functional.cross_entropy(
            logits, target, ignore_index=ignore_index, reduction=reduction
        )

    monkeypatch.setattr(own_op, "loss", loss, raising=False)
    spec = KernelSpec("cross_entropy", "mine", "own_op:loss", backward=True, predicted_gain=3.0)
    torch.manual_seed(0)
    model = own_op.WithLoss().train()
    example = {"x": torch.randn(32, 16), "labels": torch.randint(0, 11, (32,))}
    kpt.optimize(model, example, plugins=[plugin(kernels=[spec])], budget=20.0, cache=False)
    receipt = kpt.report(model)
    (entry,) = [*receipt.accepted, *receipt.rejected]
    assert entry.rule in ("kept", "slower"), f"{entry.rule}: {entry.reason}"
    assert len(seen - {-100}) > 8


@pytest.mark.parametrize("answer", [True, 5, ("too", "wide")])
def test_a_supports_that_does_not_answer_with_a_reason_is_named(answer, monkeypatch):
    import own_op

    monkeypatch.setattr(own_op, "supports", lambda site: answer, raising=False)
    model = norm_net(False)
    kpt.optimize(model, torch.randn(64, 16), plugins=[offered("right", supports="own_op:supports")])
    (skip,) = kpt.report(model).skipped
    assert f"supports 'own_op:supports' returned {answer!r}; expected None" in skip["reason"]


def test_a_setup_that_returns_nothing_to_call_is_named(monkeypatch):
    import own_op

    monkeypatch.setattr(own_op, "setup", lambda site: None, raising=False)
    model = norm_net(False)
    kpt.optimize(model, torch.randn(64, 16), plugins=[offered("right", setup="own_op:setup")], budget=20.0)
    (entry,) = kpt.report(model).rejected
    assert entry.rule == "error"
    assert "setup 'own_op:setup' returned None; expected a function" in entry.reason


def test_a_kernel_is_judged_with_the_mask_that_only_a_compiler_would_show_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    kernel = KernelSpec(
        op="attention", name="maskless", entry="slow_kernels:ignores_masks", predicted_gain=3.0
    )
    example = {"input_ids": torch.randint(0, 50, (1, 20))}
    kpt.optimize(model, example, plugins=[plugin(kernels=[kernel])], budget=20.0, cache=False)
    assert [(entry.name, entry.rule) for entry in kpt.report(model).rejected] == [
        ("attention/maskless", "value")
    ]
