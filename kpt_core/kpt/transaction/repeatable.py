"""Whether a forward can be run a second time for one call, as a backward that recomputes has to run it."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kpt.globalstate import same
from kpt.judge import tree
from kpt.judge.modelstate import attributes_of, shared_objects
from kpt.judge.state import untouched
from kpt.transaction.counts import Counts, plain_name
from kpt.transaction.reading import own_bases, reading_of

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.transaction.execution import Runner

_RANDOM = "draws random numbers"
_log = logging.getLogger("kpt")


def unrepeatable(runner: Runner, plain: torch.nn.Module, calls: list[Call], writes_inputs: bool) -> str:
    """In what a second run of a call of inference would differ from the first, or an empty string.

    A buffer that is written to counts whatever it is given: an example may leave a maximum where it was.
    """
    counts, drawing = Counts(plain), _own_generators(plain)
    held = dict(state_tensors(plain))
    for call in calls:
        versions, states = _versions(held), [state() for state in drawing]
        numbers = counts.read()
        with untouched() as changes, runner.buffers_kept() as before, torch.no_grad():
            drawn = _run(plain, call)
            moved = sorted({*runner.moved(before), *_written(held, versions)})
            # Of a generator that the forward makes and seeds each run draws the same.
            others = bool(drawn) and drawn != _run(plain, call)
        if moved:
            return f"writes to the {'buffer' if moved[0] in runner.buffers else 'tensor'} {moved[0]}"
        counted = sorted(counts.since(numbers))
        if counted:
            return f"changes {plain_name(counted[0])}"
        if any(name.startswith("random state") for name in changes.names):
            return _RANDOM
        if others or not all(same(state(), was) for state, was in zip(drawing, states)):
            return _RANDOM
    return "writes to its inputs" if writes_inputs else ""


def _run(plain: torch.nn.Module, call: Call) -> list[bytes]:
    """Run a call; the states from which generators drew first that it passed to torch."""
    seen = _Generators()
    given = call.clone()
    try:
        with seen:
            plain.forward(*given.args, **given.kwargs)
    except Exception as error:  # noqa: BLE001 - it ran before, without the mode
        _log.debug("The forward does not run under a dispatch mode: %s", error)
        given = call.clone()
        plain.forward(*given.args, **given.kwargs)
        return []
    return seen.states


class _Generators(TorchDispatchMode):
    """Keeps the state that each generator is in when it is passed to an op at first."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[bytes] = []
        self._known: list[torch.Generator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, torch.Generator) and not any(value is one for one in self._known):
                self._known.append(value)
                self.states.append(value.get_state().numpy().tobytes())
        return func(*args, **(kwargs or {}))


def _own_generators(model: torch.nn.Module) -> list[Callable[[], Any]]:
    """Readers of the states of Python's and NumPy's generators that modules hold, or their code names."""
    numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
    readers: list[Callable[[], Any]] = []
    for value in {id(value): value for value in _within_reach(model)}.values():
        if isinstance(value, random.Random):
            readers.append(value.getstate)
        elif numpy is not None and isinstance(value, numpy.RandomState):
            readers.append(value.get_state)
        elif numpy is not None and isinstance(value, numpy.Generator):
            readers.append(partial(_state_of, value.bit_generator))
    return readers


def _state_of(bits: Any) -> list[tuple[str, Any]]:
    return list(_flat(bits.state))


def _flat(state: Any) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def _within_reach(model: torch.nn.Module) -> Iterable[Any]:
    """What modules, and objects that they hold, have as attributes, and the globals that their code names."""
    for owner in (*model.modules(), *shared_objects(model)):
        yield owner
        yield from attributes_of(owner).values()
    for cls in {type(module) for module in model.modules()}:
        names = reading_of(cls).in_calls
        for base in own_bases(cls):
            space = vars(sys.modules.get(base.__module__, object))
            yield from (vars(base)[name] for name in names if name in vars(base))
            yield from (space[name] for name in names if name in space)


def state_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a model, and the tensors that its modules hold as attributes."""
    for path, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value


def _versions(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """How often each tensor was written to, where torch counts that."""
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def _written(tensors: dict[str, torch.Tensor], versions: dict[str, int]) -> Iterator[str]:
    return (name for name, version in versions.items() if tensors[name]._version != version)


def told_by_gradients(runner: Runner, plain: torch.nn.Module, call: Call) -> str:
    """What a forward does that computes something else where inputs require a gradient, or an empty string.

    Compiled code was made for inputs that require none.
    """
    if not any(_takes_gradient(leaf) for _, leaf in call.leaves()):
        return ""
    results: list[list[torch.Tensor]] = []
    with untouched(), runner.buffers_kept(), torch.no_grad():
        for requires in (False, True):
            given = _requiring(call.clone(), requires)
            try:
                output = plain.forward(*given.args, **given.kwargs)
            except Exception as error:  # noqa: BLE001 - it ran before; an input that it writes to may be a leaf
                _log.debug("The forward does not run with inputs that require a gradient: %s", error)
                return "refuses inputs that require a gradient" if requires else ""
            results.append([leaf.detach() for _, leaf in tree.walk(output) if isinstance(leaf, torch.Tensor)])
    same_form = len(results[0]) == len(results[1]) and all(
        one.shape == other.shape and one.dtype == other.dtype for one, other in zip(*results)
    )
    if same_form and all(torch.allclose(a, b, rtol=1e-3, equal_nan=True) for a, b in zip(*results)):
        return ""
    return "computes something else for inputs that require a gradient"


def _requiring(call: Call, requires: bool) -> Call:
    return call.map_tensors(
        lambda tensor: tensor.detach().requires_grad_(requires) if _takes_gradient(tensor) else tensor
    )


def _takes_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
