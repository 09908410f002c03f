"""Notices every change of the user's model that makes a committed plan stale.

Three kinds of change, three mechanisms, because a call may only spend a few microseconds here:
what torch announces (registration of parameters, buffers and modules, steps of optimizers) arrives through
its global hooks; what passes through an object (hooks being registered, ``.to()``, a forward or a
class being assigned) through a replaced dictionary and an instance method; what leaves only a trace
(weights written in place, attributes assigned) is compared on each call.
"""

from __future__ import annotations

import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter, itemgetter
from typing import Any

import torch

from kpt.judge.modelstate import attributes_of
from kpt.judge.slots import slots_of
from kpt.transaction.announcements import Announcements
from kpt.transaction.copies import clean_copies
from kpt.transaction.held_tensors import item, tensors_inside
from kpt.transaction.hooks import computed
from kpt.transaction.reading import constants_read, is_plain, names_read, reading_of, readings
from kpt.transaction.replacements import HookDict, apply, apply_watchers, restore_apply, restore_hooks
from kpt.transaction.structure import NOT_ATTRIBUTES, Structure
from kpt.transaction.writes import Writes

_WATCHED_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WRITTEN = "a weight was written in place (call kpt.refresh(model) to use the new weights)"
_SCALARS = (bool, int, float, str, type(None))
#: What has attributes and holds no constants of a model's.
_NO_OBJECTS = (torch.nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, types.ModuleType)
_version = attrgetter("_version")
#: ``operator.call`` is new in Python 3.11.
_call: Callable[..., Any] = getattr(operator, "call", lambda function, *args: function(*args))
_requires_grad = attrgetter("requires_grad")


class Watch:
    """Watches ``model`` from construction to `close`.

    ``reason`` is None while the plan holds, else what changed. `stale` compares what has to be
    compared and costs about 0.03 µs for each watched tensor. ``moving`` are attributes of objects that a
    call itself changes, by the object's id and the name: these are left out.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        weights: bool,
        moving: frozenset[tuple[int, str]] = frozenset(),
    ) -> None:
        self.reason: str | None = None
        self._names = {id(module): name for name, module in model.named_modules()}
        self._undo: list[Callable[[], None]] = []
        #: Tables of hooks that modules had before, which can't tell when one comes or goes.
        self._hooked: list[tuple[dict[Any, Any], tuple[Any, ...]]] = []
        modules = list(dict.fromkeys(model.modules()))
        for module in modules:
            self._watch_hooks(module, is_root=module is model)
            self._watch_apply(module)
            self._undo.append(clean_copies(module))
        self.structure = Structure(model, self._names)
        self._undo.append(self.structure.close)
        self._writes = Writes(_tensors(model) if weights else ())
        self._settled = False
        if weights and (uncounted := why_no_copies(model)) is not None:
            self.reason = uncounted
        self._parameters = list(model.parameters())
        self._trainable = list(map(_requires_grad, self._parameters))
        attributes = [pair for module in modules if (pair := _attribute_getter(module)) is not None]
        attributes += _object_getters(modules, moving)
        # Side by side, so that one call in C compares them all: a loop takes twice the time.
        self._states = [state for state, _ in attributes]
        self._getters = [getter for _, getter in attributes]
        self._values = [_frozen(getter(state)) for state, getter in attributes]
        constants = _constant_getters(modules, moving)
        self._spaces = [space for space, _ in constants]
        self._readers = [reader for _, reader in constants]
        self._constants = [_frozen(reader(space)) for space, reader in constants]
        self._held = [held for module in modules for held in _held_tensors(module)]
        #: What compiled code may have frozen, too: tensors in lists, tables and objects that modules hold.
        self._inside = [found for module in modules for found in tensors_inside(module)] if weights else []
        held = [tensor for _, _, tensor, _ in (*self._held, *self._inside)] if weights else []
        #: What an optimizer may write, by its id.
        self._copied = frozenset(map(id, (*self._writes.tensors, *held)))
        _announcements.add(self)

    @property
    def tensors(self) -> int:
        """How many tensors are compared on each call."""
        return len(self._writes.tensors)

    def stale(self, grad: bool = False) -> str | None:
        """What changed since construction, or None. ``grad`` says that gradients are recorded."""
        if self.reason is not None:
            return self.reason
        for table, keys in self._hooked:
            if tuple(table) != keys:
                return "a hook was registered on a submodule, or removed"
        structure = self.structure
        if structure.unsure or (structure.containers and structure.resized()):
            changed = self.structure.changed()
            if changed is not None:
                return changed
        if grad and list(map(_requires_grad, self._parameters)) != self._trainable:
            return "a parameter was frozen or unfrozen (call kpt.refresh(model))"
        if self._writes.tensors and self._writes.happened():
            return self.ended(_WRITTEN) if self._settled else _WRITTEN
        try:
            if self._getters and list(map(_call, self._getters, self._states)) != self._values:
                return "an attribute of a submodule or of its config changed"
        except (KeyError, AttributeError):
            return "an attribute of a submodule or of its config was deleted"
        except (RuntimeError, ValueError):  # a tensor or an array in place of a constant
            return "an attribute of a submodule or of its config changed"
        try:
            if self._readers and list(map(_call, self._readers, self._spaces)) != self._constants:
                return "a global or an attribute of a class changed that the model's code reads"
        except (KeyError, RuntimeError, ValueError):
            return "a global or an attribute of a class changed that the model's code reads"
        for held, name, tensor, version in self._held:
            if held.get(name) is not tensor or (version is not None and _version(tensor) != version):
                return "a tensor that a submodule holds as a plain attribute changed"
        for container, key, tensor, version in self._inside:
            if item(container, key) is not tensor or (version is not None and _version(tensor) != version):
                return "a tensor in a list, a table or an object that a submodule holds changed"
        return None

    def look_again(self) -> None:
        """Compare forwards, classes and children on the next call, whatever was noticed."""
        self.structure.unsure = True

    def settle(self) -> None:
        """Take the weights' versions as they are now: nothing but kpt wrote since construction.

        From here on a write is there to stay: before, the run that made the plan puts the counters back.
        """
        self._writes.settle()
        self._settled = True

    def registered(self, module: torch.nn.Module, kind: str, name: str) -> None:
        path = self._names.get(id(module))
        if path is not None:
            self.ended(f"{kind} {name!r} was registered on {path or 'the model'}")

    def steps(self, parameters: Iterator[torch.Tensor]) -> None:
        """An optimizer is about to write ``parameters`` without counting it."""
        if self.reason is not None or not self._copied:
            return
        try:
            written = not self._copied.isdisjoint(map(id, parameters))
        except Exception:  # noqa: BLE001 - a step must not fail because somebody else's optimizer is unusual
            written = True
        if written:
            self.ended(_WRITTEN)

    def ended(self, reason: str) -> str:
        """The plan is stale for good, for the first ``reason`` that came.

        No write is noticed any more, nor is memory kept for that, which ``.to()`` may be about to exchange.
        """
        self.reason = self.reason or reason
        self._writes.forget()
        return self.reason

    def close(self) -> None:
        """Leave nothing behind on the model."""
        _announcements.discard(self)
        self._writes.forget()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _watch_hooks(self, module: torch.nn.Module, *, is_root: bool) -> None:
        for name in _WATCHED_HOOKS:
            if is_root and "forward" in name:
                continue  # the root's own hooks run around the dispatcher
            original = module.__dict__[name]
            if original:  # known when the plan was made, and handles refer to this very dictionary
                self._hooked.append((original, tuple(original)))
                continue
            watched = HookDict()
            watched.watch = self
            watched.path = self._names[id(module)]
            module.__dict__[name] = watched
            self._undo.append(restore_hooks(module, name, original))

    def _watch_apply(self, module: torch.nn.Module) -> None:
        current = module.__dict__.get("_apply")
        if current is not None and getattr(current, "__func__", None) is not apply:
            return  # somebody else's; ours stays behind in a deep copy of an optimised model
        module.__dict__["_apply"] = types.MethodType(apply, module)
        apply_watchers[module] = weakref.ref(self)
        self._undo.append(restore_apply(module))


_announcements = Announcements()


def _tensors(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Every parameter and buffer whose version torch tracks."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not tensor.is_inference():
            yield tensor


def why_no_copies(model: torch.nn.Module) -> str | None:
    """Why no plan may hold copies of the model's tensors, if writes to one of them are not counted."""
    name = next((name for name, tensor in _named_tensors(model) if tensor.is_inference()), None)
    if name is None:
        return None
    return (
        f"{name} was made in inference mode, where torch counts no writes, so that copies of it "
        "could go stale (build the model, and call it for the first time, outside of torch.inference_mode)"
    )


def _named_tensors(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters, buffers, and what modules hold as plain attributes."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for _, name, tensor, _ in _held_tensors(module):
            yield f"{path}.{name}".lstrip("."), tensor
        for _, key, tensor, _ in tensors_inside(module):
            yield f"{path} (held as {key!r})".lstrip(), tensor


def _attribute_getter(
    module: torch.nn.Module,
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]] | None:
    """The module's dictionary and a getter of those of its plain attributes that its code reads."""
    names = reading_of(type(module)).names | names_read(module)
    state = module.__dict__
    keys = sorted(key for key, value in state.items() if key in names and is_plain(value))
    if not keys:
        return None
    return state, itemgetter(*keys)


def _constant_getters(
    modules: list[torch.nn.Module], moving: frozenset[tuple[int, str]]
) -> list[tuple[Mapping[str, Any], Callable[[Mapping[str, Any]], Any]]]:
    """Constants among the globals of the modules' code and on their classes, which that code reads."""
    found = constants_read(modules)
    return [
        (space, itemgetter(*names))
        for owner, space, read in found
        if (names := [name for name in read if (owner, name) not in moving])
    ]


def _object_getters(
    modules: list[torch.nn.Module], moving: frozenset[tuple[int, str]]
) -> list[tuple[Any, Callable[[Any], Any]]]:
    """Constants of objects that modules hold, and of those that these hold: compiled code has them built in.

    Watched are those that the code of a module or of the object's own class reads, and the switches of a
    ``config``, which functions read that are given the module.
    """
    found: list[tuple[Any, Callable[[Any], Any]]] = []
    seen: set[int] = set()
    read = frozenset().union(*(reading.names for reading in readings(modules)))
    pending = [
        (name, value, True)
        for module in modules
        for name, value in attributes_of(module).items()
        if name not in NOT_ATTRIBUTES
    ]
    for name, value, direct in pending:
        if id(value) in seen or isinstance(value, (*_NO_OBJECTS, *_SCALARS)):
            continue
        seen.add(id(value))
        state = getattr(value, "__dict__", None)
        state, slots = state if isinstance(state, dict) else {}, slots_of(value)
        switches = (bool, str, type(None)) if name == "config" else ()
        names = read | reading_of(type(value)).names if state or slots else read
        for holder, held, get in ((state, state, itemgetter), (value, slots, attrgetter)):
            keys = sorted(
                key
                for key, item in held.items()
                if (id(value), key) not in moving
                and (isinstance(item, switches) or (key in names and isinstance(item, _SCALARS)))
            )
            if keys:
                found.append((holder, get(*keys)))
        if direct:
            pending += [(key, item, False) for key, item in {**state, **slots}.items() if key in names]
    return found


def _held_tensors(module: torch.nn.Module) -> Iterable[tuple[dict[str, Any], str, torch.Tensor, int | None]]:
    """Tensors that are neither parameters nor buffers, with their versions where torch counts them.

    Those that hooks compute are made anew of the others at each call.
    """
    made = computed(module)
    for name, value in module.__dict__.items():
        if isinstance(value, torch.Tensor) and name not in made:
            yield module.__dict__, name, value, None if value.is_inference() else value._version


def _frozen(value: Any) -> Any:
    """A copy that later changes of lists inside ``value`` do not reach."""
    if type(value) is tuple:
        return tuple(_frozen(item) for item in value)
    return value.copy() if type(value) in (list, dict) else value
