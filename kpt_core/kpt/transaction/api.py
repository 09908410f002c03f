"""The public functions: `optimize`, `report`, `restore`, `refresh`.

The way of one run, top to bottom: `optimize` checks what it was given; `_run` observes, stores the
baseline, asks for proposals, searches (or applies a cached recipe), commits and writes the receipt.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.weak import WeakIdKeyDictionary

from kpt import plugins
from kpt.error_text import described
from kpt.specs import LEVELS, OBJECTIVES
from kpt.transaction import dispatch, distributed
from kpt.transaction.accuracy import Accuracy
from kpt.transaction.receipt import Receipt
from kpt.transaction.request import Request
from kpt.transaction.run import execute
from kpt.transaction.serving import Plan
from kpt.transaction.suitability import unreachable

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.specs import Level, Objective

Model = TypeVar("Model", bound=torch.nn.Module)

_lock = threading.RLock()
# By identity: a model's class may say that two of its instances are equal.
_receipts: MutableMapping[torch.nn.Module, Receipt] = WeakIdKeyDictionary()
_requests: MutableMapping[torch.nn.Module, Request] = WeakIdKeyDictionary()
#: Devices and dtypes of each model in its last run, which its examples were for.
_last_kinds: MutableMapping[torch.nn.Module, tuple[set[torch.device], set[torch.dtype]]] = (
    WeakIdKeyDictionary()
)


def optimize(
    model: Model,
    example_inputs: Any = None,
    *,
    level: Level = "production",
    objective: Objective = "latency",
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    accuracy: Accuracy | None = None,
    budget: float = 120.0,
    plugins: Sequence[Any] | None = None,
    trackers: Sequence[Any] = (),
    cache: bool = True,
    fuel: int | None = None,
) -> Model:
    """Make ``model`` faster on the hardware it is on, and prove that it is still right.

    The same object is returned, changed in place by one reversible patch; if nothing pays for itself
    it is returned as it was. `report` tells what was tried, kept and rejected.

    Args:
        model: any `torch.nn.Module`. Its mode decides what is optimised: training with gradients on,
            else inference.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an
            iterable of these (at most 8 are read). Without any, the first real call is observed,
            answered by the original forward, and then optimised for.
        level: "exact" keeps dtypes; "production" may compute in lower floating-point precision;
            "aggressive" may quantise.
        objective: "latency" keeps a plan that is faster per call on your examples. "throughput" keeps one by
            which more calls are done in the same time: calls are timed as they come to a server, from several
            threads at once on a CPU, queued on an accelerator; the batch size is that of your examples.
            "memory" keeps one whose peak of a call, weights and the plan's
            own copies included, is at least 2 % lower and that is not slower beyond doubt. The original
            weights stay in memory under every objective.
        dynamic_shapes: dimensions that vary, as ``{"input_ids": {0: "batch", 1: "sequence"}}``.
        accuracy: the user's own metric, which outranks the referee's tolerances.
        budget: seconds that the search may take.
        plugins: names of (or objects that are) the only plugins to use; one that is asked for by name
            and is unavailable is an error.
        trackers: names of trackers, or objects with ``record(receipt_dict)``.
        cache: whether a recipe found earlier may be used and a new one is stored.
        fuel: the most variants that a plan may hold, to find a bad one by bisection.

    Raises:
        TypeError, ValueError: an argument is of no known form; the message says what is expected.
        kpt.plugins.PluginError: a plugin asked for by name is unavailable.
    """
    request = _request(
        model,
        level=level,
        objective=objective,
        dynamic_shapes=dynamic_shapes,
        accuracy=accuracy,
        budget=budget,
        plugins=plugins,
        trackers=trackers,
        cache=cache,
        fuel=fuel,
    )
    target = distributed.unwrap(model)
    if example_inputs is None:
        with _lock:
            _restore_tree(target)
            _defer(target, request)
        return model
    run(target, example_inputs, request)
    return model


def run(model: torch.nn.Module, example_inputs: Any, request: Request) -> Receipt:
    """Optimise ``model`` for the examples now; one run at a time in a process."""
    with _lock:
        _restore_tree(model)
        from kpt.transaction.deferred import searching

        searching.set()
        try:
            # Leaving inference mode turns gradients on; a call under no_grad is no training step.
            grad = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                receipt = execute(model, example_inputs, request)
        finally:
            searching.clear()
        _receipts[model] = receipt
        _requests[model] = request
        _last_kinds[model] = _kinds(model)
        return receipt


def remember(model: torch.nn.Module, receipt: Receipt, request: Request) -> None:
    """Let `report`, `refresh` and `kpt.save` know a model that was loaded as it is, without a run."""
    with _lock:
        _receipts[model] = receipt
        _requests[model] = request
        _last_kinds[model] = _kinds(model)


def report(model: torch.nn.Module) -> Receipt:
    """The receipt of the last run on ``model``, with the calls counted since.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` was never optimised in this process.
    """
    target = _module(model, "kpt.report")
    receipt = _receipts.get(target)
    plan = dispatch.plan_of(target)
    if receipt is None:
        if plan is not None:
            return Receipt(
                model=type(target).__name__,
                mode="deferred",
                level=_requests[target].level,
                objective=_requests[target].objective,
                reason="waiting for the first call",
            )
        raise ValueError(f"this {type(target).__name__} was not optimised; call kpt.optimize(model) first")
    if isinstance(plan, Plan):
        receipt.calls = plan.calls()
    return receipt


def restore(model: Model) -> Model:
    """Take the optimisation back: the original forward, with the current weights.

    A model that carries no plan is returned as it is.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: another library wrapped the forward since and cannot be unwound; it is named.
    """
    target = _module(model, "kpt.restore")
    with _lock:
        _take_back(target)
        receipt = _receipts.get(target)
        if receipt is not None and receipt.status == "optimized":
            receipt.status, receipt.reason = "restored", "restored by the user"
    return model


def refresh(model: Model) -> Model:
    """Apply the plan again to the current weights and structure, and judge it again.

    Needed after writes that leave no trace: to tensors (``tensor.data.mul_``), and to modules past their
    own interface (``module.__dict__["forward"] = f``, ``module._modules[name] = m``, a method assigned to
    the module's class). Needed, too, to leave the original forward after weights changed, adapters were
    merged, or the model was moved. The plan that was found before is applied, judged and timed; a search
    follows only if it does not hold any more. The examples of the last run follow
    the model to its device, and to its floating-point dtype if it was cast since (``.half()``).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``model`` was never optimised in this process.
    """
    target = _module(model, "kpt.refresh")
    request = _requests.get(target)
    if request is None:
        raise ValueError(f"this {type(target).__name__} was not optimised; call kpt.optimize(model) first")
    if request.examples is None:
        return model  # deferred and not called yet: the first call will see the current weights
    run(target, _moved(request.examples, target), request.again(_receipts.get(target)))
    return model


def check_module(model: Any, function: str) -> None:
    """Raise TypeError, in the name of the public ``function``, where ``model`` is no module."""
    if isinstance(model, torch.nn.Module):
        return
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise TypeError(f"{function} got the class {model.__name__}; make a model of it first and pass that")
    raise TypeError(f"{function} got {type(model).__name__}; expected a torch.nn.Module")


def _module(model: Any, function: str) -> torch.nn.Module:
    """The module that carries the plan of ``model``."""
    check_module(model, function)
    return distributed.unwrap(model)


def _kinds(model: torch.nn.Module) -> tuple[set[torch.device], set[torch.dtype]]:
    """The devices of a model's tensors and the floating-point dtypes of its parameters."""
    parameters = list(model.parameters())
    devices = {tensor.device for tensor in (*parameters, *model.buffers())}
    return devices, {p.dtype for p in parameters if p.is_floating_point()}


def _moved(examples: list[Call], model: torch.nn.Module) -> list[Call]:
    """The examples as the model takes them now: with it on its device, and in its dtype if it was cast."""
    devices, dtypes = _kinds(model)
    old_devices, old_dtypes = _last_kinds.get(model, (devices, dtypes))
    device = next(iter(devices)) if len(devices) == 1 and devices != old_devices else None
    dtype = next(iter(dtypes)) if len(dtypes) == 1 and dtypes != old_dtypes else None
    if device is None and dtype is None:
        return examples

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(
            device=device if tensor.device in old_devices else None,
            dtype=dtype if tensor.is_floating_point() else None,
        )

    return [call.map_tensors(move) for call in examples]


# ---------------------------------------------------------------------------------------------


def request_of(model: torch.nn.Module) -> Request:
    """What was asked for in the last run on ``model``.

    Raises:
        ValueError: ``model`` was never optimised in this process.
    """
    request = _requests.get(distributed.unwrap(model))
    if request is None:
        raise ValueError(f"this {type(model).__name__} was not optimised; call kpt.optimize(model) first")
    return request


def make_request(model: torch.nn.Module, **options: Any) -> Request:
    """A checked request with defaults for what is not given."""
    defaults: dict[str, Any] = {
        "level": "production",
        "objective": "latency",
        "dynamic_shapes": None,
        "accuracy": None,
        "budget": 120.0,
        "plugins": None,
        "trackers": (),
        "cache": True,
        "fuel": None,
    }
    return _request(model, **{**defaults, **options})


def _request(model: Any, **options: Any) -> Request:
    check_module(model, "kpt.optimize")
    if options["level"] not in LEVELS:
        raise ValueError(f"level={options['level']!r}; expected one of {', '.join(LEVELS)}")
    if options["objective"] not in OBJECTIVES:
        raise ValueError(f"objective={options['objective']!r}; expected one of {', '.join(OBJECTIVES)}")
    if options["accuracy"] is not None and not isinstance(options["accuracy"], Accuracy):
        raise TypeError(
            f"accuracy got {type(options['accuracy']).__name__}; expected kpt.Accuracy(metric, max_drop=...)"
        )
    budget = options["budget"]
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget!r}; expected a positive number of seconds")
    fuel = options["fuel"]
    if fuel is not None and (isinstance(fuel, bool) or not isinstance(fuel, int) or fuel < 0):
        raise ValueError(f"fuel={fuel!r}; expected None or a number of variants >= 0")
    shapes = options["dynamic_shapes"]
    if shapes is not None and not isinstance(shapes, Mapping):
        raise TypeError(
            f"dynamic_shapes got {type(shapes).__name__}; expected a dict like "
            "{'input_ids': {0: 'batch', 1: 'sequence'}}"
        )
    selection = options.pop("plugins")
    if isinstance(selection, str):
        raise TypeError(f"plugins={selection!r}; expected a list of names, as plugins=[{selection!r}]")
    if selection is not None and not isinstance(selection, (Sequence, Set)):
        raise TypeError(f"plugins got {type(selection).__name__}; expected a list of names or objects")
    trackers = options["trackers"]
    if isinstance(trackers, str) or not isinstance(trackers, (Sequence, Set)):
        raise TypeError(f"trackers={trackers!r}; expected a list of names or objects with record(receipt)")
    if not isinstance(options["cache"], bool):
        raise TypeError(f"cache={options['cache']!r}; expected True or False")
    chosen = None if selection is None else list(selection)
    registry = plugins.registry(chosen)
    offered = [found.spec.name for found in registry.specs("kpt_trackers")]
    for tracker in trackers:
        if isinstance(tracker, str) and tracker not in offered:
            raise plugins.PluginError(
                f"No plugin in use offers a tracker called {tracker!r}; known are "
                f"{', '.join(offered) or 'none'}.",
                "kpt plugins list",
            )
        if not isinstance(tracker, str) and not callable(getattr(tracker, "record", None)):
            raise TypeError(
                f"trackers holds a {type(tracker).__name__}; expected names or objects with record(receipt)"
            )
    return Request(registry=registry, selection=chosen, **options)


def _defer(model: torch.nn.Module, request: Request) -> None:
    from kpt.transaction.deferred import Deferred

    def original(reason: str) -> Receipt:
        return Receipt(
            model=type(model).__name__,
            mode="deferred",
            level=request.level,
            objective=request.objective,
            reason=reason,
        )

    def start(target: torch.nn.Module, call: Call) -> None:
        try:
            run(target, call, request)
        except Exception as error:
            _receipts[target] = original(f"the run failed: {described(error)}")
            raise

    _receipts.pop(model, None)
    _requests[model] = request
    reason = unreachable(model)
    if reason is not None:
        _receipts[model] = original(reason)
        return
    Deferred(model, start)


def _take_back(model: torch.nn.Module) -> None:
    plan = dispatch.plan_of(model)
    if plan is not None:
        complaints = plan.committed.take_back()
        if model in _receipts:
            _receipts[model].notes.extend(complaints)


def _restore_tree(model: torch.nn.Module) -> None:
    """A model is optimised as a whole: plans of the model itself, of its parts, and of models that it is a
    part of are taken back. Of the latter no call would be served: another forward stands in the part's place.
    """
    for other in list(_requests):
        if other is not model and isinstance(dispatch.plan_of(other), Plan):
            path = next((name for name, module in other.named_modules() if module is model), None)
            if path is not None:
                _end(other, f"its part {path} was optimised by itself")
    _take_back(model)
    for module in list(model.modules()):
        _end(module, "a model that it is a part of was optimised as a whole")


def _end(model: torch.nn.Module, reason: str) -> None:
    if dispatch.plan_of(model) is None:
        return
    _take_back(model)
    receipt = _receipts.get(model)
    if receipt is not None and receipt.status == "optimized":
        receipt.status, receipt.reason = "restored", reason
