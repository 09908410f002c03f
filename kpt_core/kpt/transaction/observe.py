"""Stage 1: what is to be optimised, for what calls, in which mode, on what hardware."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from kpt.error_text import add_note
from kpt.judge import kinds, outputs, tree
from kpt.judge.calls import Call, as_calls, check_devices
from kpt.judge.draws import InputSpec
from kpt.kernels import ops_with_kernels
from kpt.specs import Observation
from kpt.transaction import workspace
from kpt.transaction.ambient import ambient_state
from kpt.transaction.arguments import never_served
from kpt.transaction.dispatch import original_forward
from kpt.transaction.execution import Runner, seeded
from kpt.transaction.moving import moving_state
from kpt.transaction.repeatable import state_tensors, told_by_gradients, unrepeatable
from kpt.transaction.signature import Canonical
from kpt.transaction.suitability import (
    Unsuitable,
    explain_failure,
    foreign_kind,
    refuse_bypassed,
    refuse_unsuitable,
)

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Level, Mode, Objective

#: Share of the budget that is left which recognition may take, and the seconds that it may take in any case
#: while these are not half of it: a busy machine needs ten times what a quiet one does.
_SHARE = 0.1
_SECONDS = 5.0
#: Share of the budget that is left which calls with several examples may take, three each.
_LOOKED_AT = 0.025

_log = logging.getLogger("kpt")


def proof_seconds(left: float) -> float:
    """Seconds that proofs of what a model computes may take of a budget of which ``left`` is left."""
    return max(_SHARE * left, min(_SECONDS, 0.5 * left))


def import_dynamo() -> None:
    """Proofs run under modes whose code imports dynamo at first; that alone takes seconds."""
    import torch._dynamo  # noqa: F401


def device_of(model: torch.nn.Module) -> torch.device:
    """The device of the model's first tensor; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def prepare_calls(model: torch.nn.Module, example_inputs: Any) -> list[Call]:
    """The examples as calls in canonical form, copied, on the model's device.

    Raises:
        TypeError, ValueError: the examples are of no known form, or on another device than the model.
        Unsuitable: a tensor is of a kind that no input like it can be drawn of, or every example holds an
            argument that no guard can tell from another.
    """
    calls = as_calls(example_inputs)
    for call in calls:
        for path, leaf in call.leaves():
            if isinstance(leaf, torch.Tensor) and (kind := foreign_kind(leaf)):
                raise Unsuitable(f"the input {tree.spell(path)} is a {kind} tensor; plain ones are expected")
    check_devices(calls, model)
    canonical = Canonical(original_forward(model))
    prepared = [Call(*canonical(call.args, call.kwargs)).clone() for call in calls]
    refusals = [never_served(call.args, call.kwargs) for call in prepared]
    if None not in refusals:
        raise Unsuitable(
            f"the {refusals[0]}; plans serve tensors, numbers, strings, and lists, tuples, dicts, named "
            "tuples and dataclasses (without slots) of these"
        )
    return prepared


def mode_of(model: torch.nn.Module) -> Mode:
    trains = model.training and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    return "training" if trains else "inference"


def observe(
    model: torch.nn.Module,
    calls: list[Call],
    spec: InputSpec,
    *,
    level: Level,
    objective: Objective,
    hardware: HardwareProfile,
    registry: Any,
    deadline: Any,
) -> tuple[Observation, torch.nn.Module]:
    """Run the model once or twice and look at it; the second result is a plain workspace copy.

    Raises:
        Unsuitable: the forward keeps state in attributes, which a copy would not share.
    """
    refuse_unsuitable(model)
    mode = mode_of(model)
    plain = workspace.clone(model)
    runner = Runner(plain, training=mode == "training")
    typical = kinds.representatives(spec)
    each, writes = _warm_up(model, runner, plain, calls, [call for call, _ in typical])
    seconds = sum(share * own for (_, share), own in zip(typical, each, strict=True))
    refuse_bypassed(runner, plain, calls[0])
    moving = moving_state(runner, plain, calls[0])
    looked_at = _various(calls, int(_LOOKED_AT * deadline.left() / max(3.0 * seconds, 1e-9)))
    detached = (frozenset[str](), frozenset[str]())
    if mode == "inference":
        detached = _detached(runner, plain, looked_at, False), _detached(runner, plain, looked_at, True)
    once = ""
    if mode == "inference":
        once = unrepeatable(runner, plain, looked_at, writes) or told_by_gradients(runner, plain, calls[0])
    stochastic = mode == "training" and _varies(runner, plain, calls[0])
    samples = stochastic and _samples(plain, calls[0])
    operations = _operations(runner, plain, typical) if sum(each) < 0.05 * deadline.left() else 0.0
    from kpt import ops

    import_dynamo()
    recognition = ops.recognise(
        plain,
        calls,
        registry=registry,
        deadline=time.monotonic() + proof_seconds(deadline.left()),
        first=ops_with_kernels(registry, hardware, device_of(model).type),
    )
    parameters = list(model.parameters())
    return (
        Observation(
            model=model,
            calls=tuple(call.clone() for call in calls),  # which plugins may write to
            spec=spec,
            mode=mode,
            level=level,
            objective=objective,
            hardware=hardware,
            device_type=device_of(model).type,
            sites=tuple(recognition.sites),
            left_alone=tuple(recognition.left_alone),
            census=dict(Counter(type(m).__name__ for m in model.modules())),
            parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
            parameter_dtypes=frozenset(str(p.dtype).removeprefix("torch.") for p in parameters),
            baseline_seconds=seconds,
            operations=operations * (3.0 if mode == "training" else 1.0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            stochastic=stochastic,
            samples=samples,
            budget_left=deadline.left(),
            ambient=ambient_state(),
            moving=moving,
            unfinished_proofs=recognition.unfinished,
            writes_inputs=writes,
            detached=detached,
            unrepeatable=once,
        ),
        plain,
    )


def _warm_up(
    model: torch.nn.Module, runner: Runner, plain: torch.nn.Module, calls: list[Call], typical: list[Call]
) -> tuple[list[float], bool]:
    """Run every example once (an example that eager cannot run is the user's error), then ``typical`` ones.

    Returns the seconds of each of these, and whether the forward writes to a tensor that it is given.
    """
    writes = False
    finite: dict[str, bool] = {}
    sizes: list[int] = []
    with runner.buffers_kept():
        for number, call in enumerate(calls):
            given = call.clone()
            try:
                output = runner.step(plain.forward, given)
            except Exception as error:
                explain_failure(model, runner, plain, call, error)
                which = f"example_inputs[{number}]" if len(calls) > 1 else "example_inputs"
                add_note(
                    error,
                    f"kpt.optimize called {type(model).__name__} with {which}, and the model raised this. "
                    "Pass what the model can be called with; it is as it was.",
                )
                raise
            writes = writes or outputs.identical(call, given) is not None
            for path, leaf in tree.walk(output):
                if isinstance(leaf, torch.Tensor) and leaf.is_nested:
                    raise Unsuitable(f"{tree.spell(path)} is a nested tensor, which cannot be compared")
                if outputs.computed_later(leaf):
                    kind = type(leaf).__name__
                    raise Unsuitable(f"{tree.spell(path)} is a {kind}: it is computed after the call")
                if isinstance(leaf, torch.Tensor):
                    sizes.append(leaf.numel())
                if _holds_floats(leaf):
                    name = tree.spell(path)
                    finite[name] = finite.get(name, False) or _any_finite(leaf)
        if unjudged := [name for name, found in finite.items() if not found]:
            raise Unsuitable(
                f"{unjudged[0]} is NaN or infinite in every element on every example, so that nothing could "
                "be judged by it; pass examples of which the model computes numbers"
            )
        if sizes and not any(sizes):
            raise Unsuitable(
                "the outputs hold no element on any example, so that nothing could be judged by them; pass "
                "examples with one row at least"
            )
        seconds = []
        for call in typical:
            given = call.clone()
            start = time.perf_counter()
            runner.step(plain.forward, given)
            seconds.append(time.perf_counter() - start)
        return seconds, writes


def _holds_floats(leaf: Any) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.layout is torch.strided
        and (leaf.is_floating_point() or leaf.is_complex())
        and leaf.numel() > 0
        and leaf.device.type != "meta"
    )


def _any_finite(tensor: torch.Tensor) -> bool:
    """Whether an element is neither NaN nor infinite; most tensors tell by their first piece."""
    pieces = tensor.detach().reshape(-1).split(1 << 16)
    return any(
        bool(torch.isfinite(piece.float() if piece.element_size() == 1 else piece).any()) for piece in pieces
    )


def _various(calls: list[Call], number: int) -> list[Call]:
    """``number`` of the calls, one at least: those of other structure, dtypes or shapes first."""
    kinds: dict[Any, Call] = {}
    for call in calls:
        leaves = ((path, _kind(leaf)) for path, leaf in call.leaves())
        kinds.setdefault(tuple(leaves), call)
    others = [call for call in calls if all(call is not first for first in kinds.values())]
    return [*kinds.values(), *others][: max(1, number)]


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else type(leaf)


def _detached(
    runner: Runner, plain: torch.nn.Module, calls: list[Call], inputs_require: bool
) -> frozenset[str]:
    """The outputs that carry no gradient when gradients are recorded, as under a forward's own ``no_grad``.

    None are named where the forward cannot run so. What a backward would need is not kept. Buffers are
    copies: one that the forward writes to without a ``detach`` takes on the history of what is written.
    """

    def given(path: tree.Path, leaf: Any) -> Any:
        takes = isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return leaf.requires_grad_() if inputs_require and takes else leaf

    carries: dict[str, bool] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)
    for call in calls:
        call = call.clone().map(given)
        with torch.enable_grad():  # what has a history keeps it
            tensors = {id(tensor): tensor.clone() for _, tensor in state_tensors(plain)}
        space = workspace.copy_of(plain, tensors)
        with runner.buffers_kept(), torch.enable_grad(), hooks:
            try:
                output = space.forward(*call.args, **call.kwargs)
            except Exception as error:  # noqa: BLE001 - it ran without gradients, which is what is optimised
                _log.debug("The forward does not run with gradients: %s", error)
                return frozenset()
        for name, tensor in outputs.tensors(output).items():
            carries[name] = carries.get(name, False) or tensor.requires_grad
    return frozenset(name for name, does in carries.items() if not does)


def _varies(runner: Runner, plain: torch.nn.Module, call: Call) -> bool:
    """Whether two seeds give two outputs, as dropout does."""
    results = []
    for seed in (1, 2):
        with seeded(seed):
            results.append(runner.collect(plain.forward, call.clone()).output)
    return outputs.identical(*results) is not None


def _samples(plain: torch.nn.Module, call: Call) -> bool:
    """Whether the outputs of a training step vary without dropout, too."""
    quiet = workspace.without_dropout(plain)
    return _varies(Runner(quiet, training=True), quiet, call)


def _operations(runner: Runner, plain: torch.nn.Module, calls: list[tuple[Call, float]]) -> float:
    """Floating-point operations of a call, the mean over calls with shares; 0.0 if one can't be counted.

    Counting runs the forward through formulas of torch's for single ops, and some refuse what the op itself
    computes (grouped-query attention in torch 2.11). The count only orders the search.
    """
    from torch.utils.flop_counter import FlopCounterMode

    operations = 0.0
    for call, share in calls:
        given = call.clone()
        with FlopCounterMode(display=False) as counter, runner.buffers_kept(), torch.no_grad():
            try:
                plain.forward(*given.args, **given.kwargs)
            except Exception as error:  # noqa: BLE001 - the forward itself ran before; this is the counting
                _log.debug("The operations of a call could not be counted: %s", error)
                return 0.0
        operations += share * float(counter.get_total_flops())
    return operations
