"""Kernels for what a forward writes out inline: proposed, judged, used, composed and undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fingerprints
import inline_models
import kpt
import mixed_models
import own_op
import slow_kernels
from fingerprints import fallbacks, fast_calls, optimized
from inline_models import built, calls, kernel
from kpt import compiling, graph_kernels, ops
from kpt.compiling import CapturedForward, CompiledForward
from kpt.graph_kernels import GraphKernelBehaviour
from kpt.ops.recognition import forget_proofs
from kpt.specs import KernelSpec, OpSpec, Variant
from kpt.transaction import forward_graph, observe
from slow_models import DirectScale, plugin

OPS = tuple(inline_models.MODELS)
VARIANT = Variant("toy")


def skipped(model: nn.Module) -> dict[str, str]:
    return {skip["name"]: skip["reason"] for skip in kpt.report(model).skipped}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_an_inline_op_is_served_by_a_registered_kernel_and_undone(op: str, training: bool) -> None:
    model, example = built(op, training)
    before = fingerprints.of_model(model)
    fresh = torch.randn_like(example)
    expected = model(fresh)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters())) if training else ()
    optimized(model, example, plugins=[plugin(kernels=[kernel(op)])], budget=30.0)
    (accepted,) = kpt.report(model).accepted
    assert (accepted.name, accepted.phase) == (f"{op}/toy", "kernels")
    assert accepted.reason.startswith("replaces 1 regions of the captured graph: (root):")
    calls.clear()
    found = model(fresh) if training else _without_gradients(model, fresh)
    assert (calls[op], fast_calls(model)) == (1, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if training:
        mine = torch.autograd.grad(found.square().sum(), list(model.parameters()))
        torch.testing.assert_close(mine, gradients, rtol=1e-3, atol=1e-4)
    kpt.restore(model)
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []
    calls.clear()
    assert torch.equal(model(fresh), expected) and not calls


def _without_gradients(model: nn.Module, *args: Any) -> Any:
    with torch.no_grad():
        return model(*args)


def test_a_module_that_was_not_proved_in_time_is_not_replaced_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The toy norm computes row by row: in the graph, one kernel call for each row would be slower."""
    forget_proofs()
    monkeypatch.setattr(observe, "proof_seconds", lambda left: -1.0)
    offered = [plugin(DirectScale, kernels=[kernel("rms_norm")])]
    model = mixed_models.mixed()
    kpt.optimize(model, torch.randn(64, 64), plugins=offered, budget=30.0, cache=False)
    assert skipped(model)["rms_norm/toy"].endswith("would take the place of parts of them")
    assert any("not recognised for lack of time" in note for note in kpt.report(model).notes)


def test_proofs_have_seconds_of_a_small_budget() -> None:
    assert [observe.proof_seconds(left) for left in (4.0, 20.0, 120.0)] == [2.0, 5.0, 12.0]


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_that_is_wrong_by_one_percent_is_rejected(op: str) -> None:
    model, example = built(op)
    before = fingerprints.of_model(model)
    offered = plugin(kernels=[kernel(op, f"wrong_{op}")])
    kpt.optimize(model, example, plugins=[offered], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert [(entry.name, entry.rule) for entry in receipt.rejected] == [(f"{op}/toy", "value")]
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []


@pytest.mark.parametrize("entry", [*(f"wrong_{op}" for op in OPS), "careless_rms_norm"])
def test_the_wrong_ones_do_less_work_than_eager(entry: str) -> None:
    op = entry.partition("_")[2]
    model, example = built(op)
    eager = fingerprints.operations(model, example)
    behaviour = GraphKernelBehaviour(kernel(op, entry), ())
    undo = behaviour.apply(model, VARIANT)
    _without_gradients(model, example)
    calls.clear()
    assert fingerprints.operations(model, example) < (0.5 if op != "attention" else 0.9) * eager
    assert calls[op] == 1
    undo()


def test_a_gradient_that_is_wrong_by_one_percent_is_rejected_in_training() -> None:
    model, example = built("rms_norm", training=True)
    offered = plugin(kernels=[kernel("rms_norm", "careless_rms_norm")])
    kpt.optimize(model, example, plugins=[offered], budget=20.0, cache=False)
    assert [entry.rule for entry in kpt.report(model).rejected] == ["gradient"]


def test_the_kernel_serves_again_after_training_in_between() -> None:
    model, example = built("rms_norm")
    optimized(model, example, plugins=[plugin(kernels=[kernel("rms_norm")])], budget=30.0)
    calls.clear()
    model.train()
    loss = model(example).sum()
    loss.backward()
    assert not calls and sum(fallbacks(model).values()) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    model.eval()
    found = _without_gradients(model, example)
    assert calls["rms_norm"] == 1
    kpt.restore(model)
    torch.testing.assert_close(found, _without_gradients(model, example), rtol=1e-4, atol=1e-5)


def test_other_sizes_of_a_dynamic_batch_are_served() -> None:
    model, example = built("rms_norm")
    offered = [plugin(kernels=[kernel("rms_norm")])]
    optimized(model, example, plugins=offered, budget=30.0, dynamic_shapes={"x": {0: "batch"}})
    other = torch.randn(311, 64)
    calls.clear()
    found = _without_gradients(model, other)
    assert calls["rms_norm"] == 1 and fast_calls(model) == 1
    kpt.restore(model)
    torch.testing.assert_close(found, _without_gradients(model, other), rtol=1e-4, atol=1e-5)


def test_a_recipe_puts_the_kernel_back_without_a_search() -> None:
    offered = [plugin(kernels=[kernel("softmax")])]
    model, example = built("softmax")
    optimized(model, example, plugins=offered, budget=30.0, cache=True)
    again, _ = built("softmax")
    optimized(again, example, plugins=offered, budget=30.0, cache=True)
    assert kpt.report(again).recipe == "hit" and not kpt.report(again).searched
    calls.clear()
    _without_gradients(again, example)
    assert calls["softmax"] == 1


class Refuses:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing may be captured")


@pytest.mark.parametrize(
    ("op", "options", "reason"),
    [
        ("rms_norm", {"compile_safe": False}, "nothing in the model was recognised as rms_norm"),
        ("attention", {}, "nothing in the model was recognised as attention"),
        ("rms_norm", {"dtypes": ("float16",)}, None),
    ],
)
def test_a_graph_is_captured_only_where_it_can_help(
    op: str, options: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = built("rms_norm")
    if reason is not None:
        monkeypatch.setattr(forward_graph.compiling, "CompiledForward", Refuses)
    kpt.optimize(model, example, plugins=[plugin(kernels=[kernel(op, **options)])], cache=False)
    found = skipped(model)[f"{op}/toy"]
    assert found == reason if reason is not None else "computes in float32; supported: float16" in found


def test_a_kernel_of_an_op_that_nobody_recognises_says_so_and_not_that_the_model_lacks_it() -> None:
    unrecognised = OpSpec("scaled_tanh", "(x, weight) -> y", "own_op:scaled_tanh")
    spec = KernelSpec("scaled_tanh", "toy", "own_op:scaled_tanh", compile_safe=True)
    model, example = built("softmax")
    kpt.optimize(model, example, plugins=[plugin(kernels=[spec], ops=[unrecognised])], cache=False)
    reason = "kpt does not recognise sites of this op in models; call it directly"
    assert skipped(model)["scaled_tanh/toy"] == reason


def test_a_recogniser_that_raises_is_the_reason_why_its_kernel_is_skipped() -> None:
    op = OpSpec("scaled_tanh", "(x, weight) -> y", "own_op:scaled_tanh", "own_op:BrokenRecogniser")
    spec = KernelSpec("scaled_tanh", "toy", "own_op:scaled_tanh")
    model, example = built("softmax")
    kpt.optimize(model, example, plugins=[plugin(kernels=[spec], ops=[op])], cache=False)
    reason = "the recogniser BrokenRecogniser raised ImportError: no such name"
    assert skipped(model)["scaled_tanh/toy"] == reason


def test_a_strangers_recogniser_finds_its_op_in_a_graph() -> None:
    op = OpSpec("scaled_tanh", "(x, weight) -> y", "own_op:scaled_tanh", "own_op:RegionRecogniser")
    spec = KernelSpec("scaled_tanh", "toy", "own_op:scaled_tanh", compile_safe=True)
    torch.manual_seed(0)
    model, example = own_op.InlineTanh().eval(), torch.randn(256, 64)
    expected = _without_gradients(model, example)
    optimized(model, example, plugins=[plugin(kernels=[spec], ops=[op])], budget=30.0)
    (accepted,) = kpt.report(model).accepted
    assert accepted.name == "scaled_tanh/toy" and "1 regions of the captured graph" in accepted.reason
    torch.testing.assert_close(_without_gradients(model, example), expected, rtol=1e-4, atol=1e-5)


def test_a_larger_op_and_the_function_that_is_a_part_of_it_exclude_each_other() -> None:
    """Served by a kernel of its own, the function would leave nothing of the larger op in the graph."""
    loss = SimpleNamespace(
        variant=SimpleNamespace(sites=("(root):F.cross_entropy",)),
        provides=frozenset({"kernel:cross_entropy"}),
    )
    other = SimpleNamespace(variant=loss.variant, provides=frozenset({"kernel:softmax"}))
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(inline_models.InlineNorm(), backend=keep, fullgraph=True)(torch.randn(8, 64))
    (site,) = ops.recognise_graph(graphs[0], only={"rms_norm"}).sites
    site.module._region.parts = frozenset({"cross_entropy"})
    assert graph_kernels._part([site], loss) and not graph_kernels._part([site], other)


def test_a_model_whose_modules_hold_the_op_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graph, "look", Refuses)
    torch.manual_seed(0)
    model = slow_kernels.NormNet().eval()
    optimized(model, torch.randn(64, 16), plugins=[plugin(kernels=[kernel("rms_norm")])])
    assert kpt.report(model).accepted[0].reason == "right and faster"


def test_a_forward_that_dynamo_cannot_capture_is_left_alone_with_the_reason() -> None:
    class Breaks(inline_models.InlineNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else -super().forward(x)

    model = Breaks().eval()
    kpt.optimize(model, torch.randn(8, 64), plugins=[plugin(kernels=[kernel("rms_norm")])], cache=False)
    assert skipped(model)["rms_norm/toy"].startswith("dynamo cannot capture the forward")


# -- two kernels, and compilers


class NormThenSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.soft = inline_models.InlineNorm(), inline_models.InlineSoftmax()
        self.between = nn.Linear(4, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.soft(self.between(self.norm(x)))  # type: ignore[no-any-return]


def applied(model: nn.Module, *specs: Any, mode: str = "inference") -> list[GraphKernelBehaviour]:
    behaviours = [GraphKernelBehaviour(spec, (), mode=mode) for spec in specs]
    for behaviour in behaviours:
        behaviour.apply(model, VARIANT)
    return behaviours


def test_two_kernels_share_one_graph() -> None:
    torch.manual_seed(0)
    model, x = NormThenSoftmax().eval(), torch.randn(8, 64)
    expected = _without_gradients(model, x)
    behaviours = [GraphKernelBehaviour(kernel(op), ()) for op in ("rms_norm", "softmax")]
    with compiling.collect() as created:
        undos = [behaviour.apply(model, VARIANT) for behaviour in behaviours]
    _without_gradients(model, x)
    calls.clear()
    torch.testing.assert_close(_without_gradients(model, x), expected)
    assert calls == {"rms_norm": 1, "softmax": 1}
    assert len(created) == 1 and created[0].graphs == 1
    assert [list(b.replaced)[0].split(":")[0] for b in behaviours] == ["norm", "soft"]
    assert all(behaviour.verify_applied(model) for behaviour in behaviours)
    for undo in reversed(undos):
        undo()
    assert "forward" not in model.__dict__ and torch.equal(_without_gradients(model, x), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiler_of_the_whole_forward_takes_the_substitution_over(backend: str, training: bool) -> None:
    model, x = built("rms_norm", training)
    expected = model(x)
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    with compiling.collect() as created:
        (behaviour,) = applied(model, kernel("rms_norm", "opaque_rms_norm"))
        outer = model.forward = CompiledForward(model.forward, backend=backend)  # type: ignore[method-assign]
    assert created == [outer]
    with torch.set_grad_enabled(training):
        model(x)
        calls.clear()
        found = model(x)
    assert calls["rms_norm"] == 1 and outer.executions == 2 and behaviour.verify_applied(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if training:
        mine = torch.autograd.grad(found.sum(), list(model.parameters()))
        torch.testing.assert_close(mine, gradients, rtol=1e-3, atol=1e-4)
    outer.dispose()


def test_a_compiler_of_single_modules_takes_the_substitution_over() -> None:
    torch.manual_seed(0)
    model, x = NormThenSoftmax().eval(), torch.randn(8, 64)
    expected = _without_gradients(model, x)
    with compiling.collect() as created:
        applied(model, kernel("rms_norm"), kernel("softmax"))
        inner = [CompiledForward(block.forward, backend="eager") for block in (model.norm, model.soft)]
        model.norm.forward, model.soft.forward = inner  # type: ignore[method-assign, assignment]
    assert created == inner
    _without_gradients(model, x)
    calls.clear()
    torch.testing.assert_close(_without_gradients(model, x), expected)
    assert calls == {"rms_norm": 1, "softmax": 1}
    assert isinstance(model.forward, CapturedForward) and model.forward.executions == 0


def test_under_somebody_elses_compiler_the_kernel_has_no_effect_and_says_so() -> None:
    model, x = built("rms_norm")
    (behaviour,) = applied(model, kernel("rms_norm"))
    calls.clear()
    compiled = torch.compile(model.forward, backend="eager")
    found = _without_gradients(compiled, x)
    assert not calls and not behaviour.verify_applied(model)
    torch.testing.assert_close(found, _without_gradients(built("rms_norm")[0], x))


def test_autocast_inside_of_the_forward_leaves_its_regions_alone() -> None:
    class Casts(inline_models.InlineNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model, x = Casts().eval(), torch.randn(8, 64)
    applied(model, kernel("rms_norm"))
    calls.clear()
    _without_gradients(model, x)
    assert not calls


# -- which of two candidates


class WithNormModule(nn.Module):
    """The norm is a module; with the addition before it, it is another op that only the graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = slow_norm()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = self.one(x) + x
        return self.two(self.norm(total)), total


def slow_norm() -> nn.Module:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    return Norm()


def test_kernels_for_overlapping_arithmetic_are_alternatives() -> None:
    from kpt.transaction import plan, propose, run

    seen: list[Any] = []
    original = propose.propose

    def propose_and_keep(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "propose", propose_and_keep)
        kernels = [kernel("rms_norm"), kernel("add_rms_norm", "add_rms_norm")]
        kpt.optimize(
            WithNormModule().eval(), torch.randn(4, 16), plugins=[plugin(kernels=kernels)], cache=False
        )
    module, region = sorted(seen[0].candidates, key=lambda c: -len(c.name))[::-1]
    assert (module.name, region.name) == ("rms_norm/toy", "add_rms_norm/toy")
    assert plan.excludes(module, region) is not None and len(region.variant.params["regions"]) == 1
