"""Stage 1: what is to be optimised, for what calls, in which mode, on what hardware."""

from __future__ import annotations

import collections
import copy
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge import outputs, tree
from kpt.judge.calls import Call, as_calls, check_devices
from kpt.judge.draws import InputSpec
from kpt.judge.modelstate import attributes_of, shared_objects
from kpt.kernels import ops_with_kernels
from kpt.specs import Observation
from kpt.transaction import workspace
from kpt.transaction.ambient import ambient_state
from kpt.transaction.arguments import never_served
from kpt.transaction.dispatch import original_forward
from kpt.transaction.execution import Runner, seeded
from kpt.transaction.hooks import global_hooks, is_own
from kpt.transaction.reading import constants_read
from kpt.transaction.repeatable import state_tensors, told_by_gradients, unrepeatable
from kpt.transaction.signature import Canonical

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Level, Mode, Objective

_SLOTS = frozenset(vars(torch.nn.Module()))
#: Share of the budget that is left which recognition may take, and the seconds that it may take in any case
#: while these are not half of it: a busy machine needs ten times what a quiet one does.
_SHARE = 0.1
_SECONDS = 5.0

_log = logging.getLogger("kpt")


class Unsuitable(Exception):
    """The model cannot be optimised as it is; the message becomes the receipt's reason."""


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
            if isinstance(leaf, torch.Tensor) and (kind := _foreign(leaf)):
                raise Unsuitable(f"the input {tree.spell(path)} is a {kind} tensor; plain ones are expected")
    check_devices(calls, model)
    canonical = Canonical(original_forward(model))
    prepared = [Call(*canonical(call.args, call.kwargs)).clone() for call in calls]
    refusals = [never_served(call.args, call.kwargs) for call in prepared]
    if None not in refusals:
        raise Unsuitable(
            f"the {refusals[0]}; plans serve tensors, numbers, strings, and lists, tuples and dicts of these"
        )
    return prepared


def _foreign(tensor: torch.Tensor) -> str:
    """What makes ``tensor`` other than a plain one, or an empty string."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantised"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").strip("_")


def mode_of(model: torch.nn.Module) -> Mode:
    trains = model.training and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    return "training" if trains else "inference"


def unreachable(model: torch.nn.Module) -> str | None:
    """Why calls of ``model`` would never reach a forward that is set on it, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is a scripted module, which has no Python forward to change"
    if getattr(model, "_compiled_call_impl", None) is not None:
        return (
            "model.compile() was called, so that calls run what torch.compile made of the model and no other "
            "forward; set model._compiled_call_impl = None first to have it optimised instead"
        )
    if getattr(model.forward, "__func__", None) is torch.nn.Module.forward:
        return f"{type(model).__name__} has no forward for kpt to replace; rename its __call__ to forward"
    return None


def refuse_unsuitable(model: torch.nn.Module) -> None:
    """Refuse what cannot be copied or must not be bypassed.

    Raises:
        Unsuitable: with the reason.
    """
    reason = unreachable(model)
    if reason is not None:
        raise Unsuitable(reason)
    if global_hooks():
        raise Unsuitable(
            "a global module hook is registered (torch.nn.modules.module.register_module_...), which an "
            "optimised forward would bypass; remove it first"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise Unsuitable(
                f"{name} gets its shape from the first call (a lazy module); call the model once, and "
                "optimise it then"
            )
    for name, module in model.named_modules():
        if module is model:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsuitable(f"{name} is a scripted module, which has no Python forward to change")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Unsuitable(
                f"compile() was called on {name}, so that its calls run what torch.compile made of it and no "
                f"other forward; set its _compiled_call_impl = None first to have it optimised instead"
            )
        for hooks in workspace.CALLED_HOOKS:
            if any(not is_own(model, hook) for hook in (getattr(module, hooks, None) or {}).values()):
                raise Unsuitable(
                    f"{name} has a hook ({hooks.strip('_')}), which an optimised forward would bypass; "
                    "remove it, or optimise the modules inside"
                )
    if "fsdp" in type(model).__module__.lower() or any("FSDP" in type(m).__name__ for m in model.modules()):
        raise Unsuitable("the model is sharded (FSDP); optimise it before it is wrapped")
    kinds = {type(t) for t in (*model.parameters(), *model.buffers())}
    foreign = kinds - {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
    if foreign:
        raise Unsuitable(
            f"parameters are {', '.join(sorted(k.__name__ for k in foreign))}; plain tensors are expected"
        )
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        raise Unsuitable("parameters are on the meta device; load weights first")


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
    seconds, writes = _warm_up(model, runner, plain, calls)
    _refuse_bypassed(runner, plain, calls[0])
    moving = _state_of_calls(runner, plain, calls[0])
    looked_at = calls if 2 * len(calls) * seconds < 0.05 * deadline.left() else calls[:1]
    detached = (frozenset[str](), frozenset[str]())
    if mode == "inference":
        detached = _detached(runner, plain, looked_at, False), _detached(runner, plain, looked_at, True)
    once = ""
    if mode == "inference":
        once = unrepeatable(runner, plain, looked_at, writes) or told_by_gradients(runner, plain, calls[0])
    stochastic = mode == "training" and _varies(runner, plain, calls[0])
    operations = _operations(runner, plain, calls[0]) if seconds < 0.05 * deadline.left() else 0.0
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
    model: torch.nn.Module, runner: Runner, plain: torch.nn.Module, calls: list[Call]
) -> tuple[float, bool]:
    """Run every example once (an example that eager cannot run is the user's error).

    Returns the seconds of the first, and whether the forward writes to a tensor that it is given.
    """
    writes = False
    with runner.buffers_kept():
        for call in calls:
            given = call.clone()
            try:
                output = runner.step(plain.forward, given)
            except Exception as error:
                _explain(model, runner, plain, call, error)
                raise
            writes = writes or outputs.identical(call, given) is not None
            for path, leaf in tree.walk(output):
                if isinstance(leaf, torch.Tensor) and leaf.is_nested:
                    raise Unsuitable(f"{tree.spell(path)} is a nested tensor, which cannot be compared")
                if outputs.computed_later(leaf):
                    kind = type(leaf).__name__
                    raise Unsuitable(f"{tree.spell(path)} is a {kind}: it is computed after the call")
        start = time.perf_counter()
        runner.step(plain.forward, calls[0].clone())
        return time.perf_counter() - start, writes


def _refuse_bypassed(runner: Runner, plain: torch.nn.Module, call: Call) -> None:
    """Refuse a model whose class answers calls without its forward, where a plan would stand.

    Raises:
        Unsuitable: with the reason.
    """
    if type(plain).__call__ is torch.nn.Module.__call__:
        return
    own, forward, heard = plain.__dict__.get("forward"), plain.forward, []

    def listening(*args: Any, **kwargs: Any) -> Any:
        heard.append(True)
        return forward(*args, **kwargs)

    plain.__dict__["forward"] = listening
    given = call.clone()
    try:
        with runner.buffers_kept(), torch.no_grad():
            plain(*given.args, **given.kwargs)
    except Exception as error:  # noqa: BLE001 - calls take other arguments than the forward
        _log.debug("Calls of the model take something else than its forward: %s", error)
        return
    finally:
        if own is None:
            del plain.__dict__["forward"]
        else:
            plain.__dict__["forward"] = own
    if not heard:
        raise Unsuitable(
            f"{type(plain).__name__} has a __call__ of its own that does not run the forward, so that no "
            "call would reach a plan; optimise the modules inside"
        )


def _explain(
    model: torch.nn.Module, runner: Runner, plain: torch.nn.Module, call: Call, error: Exception
) -> None:
    """Return if ``error`` is the user's, the example being one that the model cannot run.

    Raises:
        Unsuitable: the model may well run it, and only what a run does beside the forward cannot.
    """
    told = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if model._forward_pre_hooks:
        raise Unsuitable(
            f"the forward does not take the example itself ({told}), and the model has a forward pre-hook, "
            "which may change what it is called with; optimise without examples, so that a call of the "
            "forward is observed, or optimise the modules inside"
        ) from error
    if not runner.training or isinstance(error, torch.OutOfMemoryError):
        return
    try:
        with torch.enable_grad():
            plain.forward(*call.clone().args, **call.clone().kwargs)
    except Exception:  # noqa: BLE001 - the forward itself fails, which the first error says
        return
    raise Unsuitable(
        f"the model is in training mode, and no gradient can be taken through its outputs ({told}); "
        "call model.eval() to optimise it for inference"
    ) from error


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


def _operations(runner: Runner, plain: torch.nn.Module, call: Call) -> float:
    """Floating-point operations of one call; 0.0 where torch cannot count them.

    Counting runs the forward through formulas of torch's for single ops, and some refuse what the op itself
    computes (grouped-query attention in torch 2.11). The count only orders the search.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, runner.buffers_kept(), torch.no_grad():
        try:
            plain.forward(*call.clone().args, **call.clone().kwargs)
        except Exception as error:  # noqa: BLE001 - the forward itself ran before; this is the counting
            _log.debug("The operations of a call could not be counted: %s", error)
            return 0.0
    return float(counter.get_total_flops())


def _state_of_calls(runner: Runner, plain: torch.nn.Module, call: Call) -> frozenset[tuple[int, str]]:
    """Refuse a forward that assigns attributes: it would advance the copy's state and not the user's.

    Objects that modules hold are shared with copies, and so are globals and classes; what a call changes of
    them is returned, by the id of the owner and the attribute's name.
    """
    shared = [(value, attributes_of(value)) for value in shared_objects(plain)]
    around = constants_read(type(module) for module in plain.modules())
    constants = {(owner, name): copy.copy(space[name]) for owner, space, names in around for name in names}
    before = {name: attributes_of(module) for name, module in plain.named_modules()}
    contents = {
        (name, key): value.copy()
        for name, state in before.items()
        for key, value in state.items()
        if key not in _SLOTS and isinstance(value, (list, dict, set, collections.deque))
    }
    tensors = {name: dict(module._buffers) for name, module in plain.named_modules()}
    with runner.buffers_kept():
        runner.step(plain.forward, call.clone())
    for name, module in plain.named_modules():
        changed = [
            key
            for key, value in attributes_of(module).items()
            if key not in before[name]
            or (before[name][key] is not value and not _equal(before[name][key], value))
            or ((name, key) in contents and not _same_items(contents[name, key], value))
        ]
        changed += [key for key, value in module._buffers.items() if tensors[name].get(key) is not value]
        if changed:
            raise Unsuitable(
                f"the forward of {name or 'the model'} assigns {', '.join(sorted(changed))} on every call; "
                "such state cannot be shared with an optimised copy (write buffers in place instead)"
            )
    moving = {
        (id(value), key)
        for value, held in shared
        for key, now in attributes_of(value).items()
        if key not in held or (held[key] is not now and not _equal(held[key], now))
    }
    moving |= {
        (owner, name)
        for owner, space, names in around
        for name in names
        if not _equal(space.get(name), constants[owner, name])
    }
    return frozenset(moving)


def _same_items(before: Any, now: Any) -> bool:
    """Whether a container holds what it held, by identity or equality of its items."""
    if type(before) is not type(now) or len(before) != len(now):
        return False
    if isinstance(before, set):
        return bool(before == now)
    if isinstance(before, dict):
        return all(k in now and (now[k] is v or _equal(now[k], v)) for k, v in before.items())
    return all(a is b or _equal(a, b) for a, b in zip(before, now))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return (
            isinstance(left, torch.Tensor)
            and isinstance(right, torch.Tensor)
            and left.shape == right.shape
            and left.dtype == right.dtype
            and bool(torch.equal(left, right))
        )
    try:
        return bool(left == right)
    except Exception:  # noqa: BLE001 - an object without a usable comparison counts as changed
        return False
