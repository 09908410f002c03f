"""Peak memory of a call, and how much a plan holds beyond the user's tensors."""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensor

from kpt.error_text import message_of
from kpt.judge.slots import slots_of
from kpt.transaction.hooks import computed

if TYPE_CHECKING:
    from kpt.transaction.applied import Applied

_ATOMS = (str, bytes, int, float, complex, type(None), type, types.ModuleType, torch.dtype, torch.device)
#: A model may refer to anything, its data set included: of its objects, and of the plan's, so many are looked
#: at, the nearest first and what containers hold that are larger than `_LARGE` last.
_MOST_OBJECTS = 1_000_000
_LARGE = 1000


def peak_bytes(function: Callable[[], Any], device_type: str | None = None) -> float:
    """Bytes allocated at the highest point of ``function()``, above what was held before it.

    ``device_type`` is where the model is; without it, the accelerator if there is one. On an accelerator
    the bytes are from its allocator's statistics; on a CPU from the profiler's allocation events, which
    see every tensor that torch allocates.
    """
    if device_type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        function()
        torch.accelerator.synchronize()
        return float(torch.accelerator.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, by Python's own error or torch's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in message_of(error)


def derived_bytes(model: torch.nn.Module, applied: Applied) -> int:
    """Bytes of the tensors that ``applied`` holds and ``model`` does not.

    Counted are tensors that can be reached from the workspace's modules, from what the steps of the plan
    keep (attributes, containers, closures, partial functions) and from compiled code (its constants, such
    as frozen weights); each storage once, in whole. Packed weights in a layout without a storage count by
    their elements. What native code allocates for itself is out of sight: scratch memory of libraries,
    pools of captured graphs, the machine code, objects that are no tensors to torch.
    """
    walk = _beside(model, applied)
    for compiled in applied.compiled:
        walk.visit(compiled.constants())
    return walk.total


def holds_copies(model: torch.nn.Module, applied: Applied) -> bool:
    """Whether a plan keeps tensors that are not the model's, whatever it says about them.

    They may be copies made from weights: a plan that does not say so must not serve stale ones. Constants
    of compiled code are left out, since compilers lift every literal into one. Where there is too much to
    look at, copies are taken to be there.
    """
    walk = _beside(model, applied)
    return walk.total > 0 or not walk.complete


def _beside(model: torch.nn.Module, applied: Applied) -> _Walk:
    """What ``applied`` holds and ``model`` does not."""
    walk = _Walk()
    walk.visit(model)
    modules = applied.module.modules() if applied.module is not None else ()
    # What a hook computes anew before each call is no copy that could go stale.
    walk.visit([vars(module).get(name) for module in modules for name in computed(module)])
    walk.total = 0
    walk.visit([applied.module, applied.behaviours, applied.undos])
    return walk


class _Walk:
    """Adds up the storages of what is visited; nothing is entered or counted twice.

    ``complete`` says whether everything was looked at.
    """

    def __init__(self) -> None:
        self.total = 0
        self.complete = True
        self._seen: set[Any] = set()
        self._kept: list[Any] = []  # what is only made by looking at it must not leave its id to another

    def visit(self, value: Any) -> None:
        pending, later = collections.deque([value]), collections.deque[Any]()
        left = _MOST_OBJECTS
        while pending or later:
            item = (pending or later).popleft()
            if isinstance(item, _ATOMS) or id(item) in self._seen:
                continue
            if left == 0:
                self.complete = False
                return
            left -= 1
            self._seen.add(id(item))
            self._kept.append(item)
            if isinstance(item, torch.Tensor):
                pending.extend(self._tensor(item))
            elif _is_array(item):
                pending.extend(self._array(item))
            else:
                parts = _parts(item)
                (pending if len(parts) <= _LARGE else later).extend(parts)

    def _tensor(self, tensor: torch.Tensor) -> list[Any]:
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass around others: quantised weights, say
            return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return []
        try:
            storage = tensor.untyped_storage()
            key, size = ("storage", storage._cdata), storage.nbytes()
        except (NotImplementedError, RuntimeError):  # opaque layouts (packed weights) have no storage
            key, size = ("opaque", id(tensor)), tensor.numel() * tensor.element_size()
        if key not in self._seen:
            self._seen.add(key)
            self.total += size
        return []

    def _array(self, array: Any) -> list[Any]:
        """Counts an array of NumPy's; a view leads to what it is a view of, a tensor it may be."""
        base = array.base
        if base is None:
            self.total += int(array.nbytes)
        return [] if base is None else [base]


def _is_array(item: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(item, numpy.ndarray)


def _parts(item: Any) -> list[Any]:
    """What ``item`` holds. Objects of kpt's own, which refer to the whole run, are not entered."""
    if isinstance(item, torch.nn.Module):
        return [value for name, value in vars(item).items() if "hooks" not in name]
    if isinstance(item, dict):
        return [*item.values()]
    if isinstance(item, (list, tuple, set, frozenset, collections.deque)):
        return [*item]
    if isinstance(item, types.FunctionType):
        defaults = (*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values())
        return [*(_content(cell) for cell in item.__closure__ or ()), *defaults, *vars(item).values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if type(item).__module__.split(".")[0] == "kpt":
        return []
    return [*getattr(item, "__dict__", {}).values(), *slots_of(item).values()]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that was not assigned yet
        return None
