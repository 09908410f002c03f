"""What the report says of a committed plan: kernels that missed, memory that it holds."""

from __future__ import annotations

import functools
import json
import types

import pytest
import torch

import kpt
import mixed_models
import slow_models
from fingerprints import optimized
from kpt.compiling import CompiledForward
from kpt.specs import KernelSpec, Variant
from kpt.transaction import dispatch, memory
from kpt.transaction.conclusion import why_nothing
from kpt.transaction.receipt import Entry, Receipt
from slow_models import DirectScale, SlowScale, net, plugin


def normed(example: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(slow_models.SlowNorm(16), torch.nn.Linear(16, 4)).eval()
    spec = KernelSpec(op="rms_norm", name="right", entry="slow_kernels:right", predicted_gain=3.0)
    return optimized(model, example, plugins=[plugin(kernels=[spec])])


def misaligned(example: torch.Tensor) -> torch.Tensor:
    """The same values one element away from an aligned address."""
    result = torch.empty(example.numel() + 1)[1:].view(example.shape)
    return result.copy_(example)


def test_an_unoptimised_report_counts_what_the_budget_left_untried():
    rules = ("slower", "value", "budget", "deadline", "budget")
    receipt = Receipt("Net", "inference", "exact", "latency")
    receipt.rejected = [Entry(rule, "compile", "cpu", rule, "") for rule in rules]
    assert why_nothing(receipt, types.SimpleNamespace(candidates=[1])) == (
        "of 5 variants none paid for itself: 1 not faster, 1 not right or not applicable, "
        "3 not tried to the end for lack of budget"
    )
    receipt.rejected = receipt.rejected[:2]
    assert why_nothing(receipt, types.SimpleNamespace(candidates=[1])).endswith(
        "1 not right or not applicable"
    )


def test_what_failed_for_one_reason_is_shown_once_with_the_names_of_all():
    receipt = Receipt("Net", "inference", "exact", "latency")
    failed = [Entry(f"compiler:{name}", "compile", "cpu", "failed", "no graph") for name in ("a", "b", "c")]
    others = [
        Entry("pass", "compile", "cpu", "slower", "0.9x", 0.9),
        Entry("d", "compile", "x", "failed", "no"),
    ]
    receipt.rejected = [failed[0], others[0], *failed[1:], others[1]]
    for shown in (str(receipt), receipt.to_html()):
        assert shown.count("no graph") == 1 and shown.count("slower: 0.9x") == 1
        assert all(entry.name in shown for entry in receipt.rejected)
        assert shown.index("compiler:b") < shown.index("pass")
    assert len(receipt.to_dict()["rejected"]) == 5


def test_calls_that_a_frozen_table_refuses_are_reported_by_site():
    example = torch.randn(64, 16)
    model = normed(example)
    with torch.no_grad():
        expected = model(example)
        assert kpt.report(model).calls["misses"] == {}
        for _ in range(3):
            torch.testing.assert_close(model(misaligned(example)), expected)
    receipt = kpt.report(model)
    assert receipt.calls["optimized"] == 4 and receipt.calls["misses"] == {"rms_norm/right at 0": 3}
    assert json.loads(receipt.to_json())["calls"]["misses"] == {"rms_norm/right at 0": 3}
    for text in (str(receipt), receipt.to_html()):
        assert "3 x rms_norm/right at 0" in text and "ran their original code" in text


class Hidden(DirectScale):
    """Keeps copies of the weights where no module holds them: in a closure, a list and a partial."""

    variant = Variant("hidden", predicted_gain=5.0, sites=(), derives=True)

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        for module in model.modules():
            if isinstance(module, SlowScale):
                weight, biases = module.weight.detach().clone(), [module.bias.detach().clone()]
                function = functools.partial(scaled, biases)

                def forward(self, x, weight=weight, function=function):
                    return function(x * weight)

                module.forward = types.MethodType(forward, module)
        return undo


def scaled(biases, x):
    return x + biases[0]


def test_copies_in_closures_are_counted():
    slow_models.Hidden, Hidden.__module__ = Hidden, "slow_models"
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(Hidden)])
    receipt = kpt.report(model)
    assert receipt.derived_bytes == 2 * 16 * 4
    assert "holds 128 bytes of copies" in str(receipt)


def test_copies_are_counted_beside_whatever_the_model_refers_to(monkeypatch):
    """Of a large data set not every object is looked at; then copies are taken to be there."""
    monkeypatch.setattr(memory, "_MOST_OBJECTS", 3000)
    monkeypatch.setattr(slow_models, "Hidden", Hidden, raising=False)
    model = net()
    model.samples = [[index] for index in range(5000)]
    model.samples[-1].append(torch.zeros(100))
    optimized(model, torch.randn(32, 16), plugins=[plugin(Hidden)])
    assert kpt.report(model).derived_bytes == 2 * 16 * 4
    applied = dispatch.plan_of(model).committed.applied
    assert memory.holds_copies(model, applied)
    assert memory.holds_copies(net(), types.SimpleNamespace(module=model, behaviours=[], undos=()))


def test_a_plan_that_reads_the_users_weights_holds_nothing():
    model = optimized(net(), torch.randn(32, 16), plugins=[plugin(DirectScale)])
    assert kpt.report(model).derived_bytes == 0 and "copies" not in str(kpt.report(model))


def test_constants_of_compiled_code_are_counted():
    model = torch.nn.Linear(64, 32).eval()
    compiled = CompiledForward(model.forward, inductor_config={"freezing": True, "cpp_wrapper": False})
    with torch.no_grad():
        try:
            compiled(torch.randn(8, 64))
        except Exception as error:
            if "compiler" in str(error).lower():
                pytest.skip("no C++ compiler")
            raise
    assert sum(t.numel() for t in compiled.constants()) >= 64 * 32
    applied = types.SimpleNamespace(module=None, behaviours=[], undos=(), compiled=[compiled])
    expected = {t.untyped_storage()._cdata for t in model.parameters()}
    held = memory.derived_bytes(model, applied)
    own = [t for t in compiled.constants() if t.layout is torch.strided]
    shared = {t.untyped_storage()._cdata for t in own} & expected
    assert held == sum(
        t.untyped_storage().nbytes() if t.layout is torch.strided else t.numel() * t.element_size()
        for t in compiled.constants()
        if t.layout is not torch.strided or t.untyped_storage()._cdata not in shared
    )
    compiled.dispose()
    assert compiled.constants() == []


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_packed_weights_without_a_storage_are_counted():
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(32, 64), None)
    applied = types.SimpleNamespace(module=None, behaviours=[lambda: packed], undos=(), compiled=[])
    assert memory.derived_bytes(net(), applied) == 32 * 64 * 4


def test_the_whole_run_is_not_counted_as_the_plans():
    model = optimized(mixed_models.mixed(), torch.randn(64, 64), plugins=mixed_models.plugins(), budget=20.0)
    committed = dispatch.plan_of(model).committed
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert 0 < memory.derived_bytes(model, committed.applied) <= weights


def test_brackets_in_names_and_reasons_are_shown_as_they_are():
    """rich reads ``[word]`` as a style, which it swallows, and ``[/word]`` as the end of one: an error."""
    reason = "RuntimeError: [enforce fail at alloc.cpp:83] cannot open [/usr/lib/x.so]"
    entry = Entry("pack[q]", "kernels", "toy[/x]", "failed", reason, 1.0)
    skip = {"name": "fold[0]", "phase": "layout", "plugin": "toy[/x]", "reason": "no [conv] here"}
    receipt = Receipt("Net", "inference", "exact", "latency", rejected=[entry], skipped=[skip])
    shown = " ".join(str(receipt).split())
    for text in ("pack[q]", "toy[/x]", "[enforce fail at alloc.cpp:83]", "[/usr/lib/x.so]", "no [conv] here"):
        assert text in shown


class SlowBatches(slow_models.Net):
    """Takes the detour for batches only."""

    def forward(self, x):
        if len(x) > 4:
            return super().forward(x)
        scaled = slow_models.fast_forward(self.slow, self.first(x))
        return self.last(self.dropout(self.norm(scaled)))


def test_a_plan_that_helps_the_fewer_calls_is_kept_and_each_kind_is_told():
    torch.manual_seed(0)
    examples = [torch.randn(1, 16)] * 5 + [torch.randn(32, 16)] * 2
    model = SlowBatches().eval()
    model.slow.rounds = 600
    receipt = kpt.report(optimized(model, examples, plugins=[plugin(DirectScale)]))
    single, batch = receipt.kinds
    assert single["label"] == "1x16 (examples 0, 1, 2, 3, ...)" and batch["label"] == "32x16 (examples 5, 6)"
    assert single["share"] == pytest.approx(5 / 7) and batch["low"] > 1.0
    assert receipt.speedup == pytest.approx(single["ratio"] ** (5 / 7) * batch["ratio"] ** (2 / 7))
    assert receipt.seconds_before == pytest.approx(
        5 / 7 * single["baseline_seconds"] + 2 / 7 * batch["baseline_seconds"]
    )
    assert "over 2 kinds of calls" in receipt.headline()
    again = Receipt.from_dict(json.loads(receipt.to_json()))
    for text in (str(receipt), receipt.to_html(), str(again)):
        assert "by kind of call:" in text and "32x16 (examples 5, 6)" in text
    kpt.restore(model)


def test_a_kind_that_a_plan_makes_slower_is_called_so():
    receipt = Receipt("Net", "inference", "exact", "latency", status="optimized")
    fields = {"share": 0.5, "low": 0.8, "baseline_seconds": 1e-3, "candidate_seconds": 1.1e-3, "pairs": 9}
    receipt.kinds = [
        {**fields, "label": "1x8", "ratio": 0.91, "high": 0.95},
        {**fields, "label": "8x8", "ratio": 0.97, "high": None},  # JSON has no infinity
    ]
    told = str(receipt)
    assert "1x8: 0.91x (1.00 ms -> 1.10 ms) - slower" in told
    assert "8x8: 0.97x (1.00 ms -> 1.10 ms)\n" in told + "\n" and told.count("slower") == 1
