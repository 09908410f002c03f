"""What passes through an object of the user's model, noticed there: hooks that come, and ``.to()``.

A dictionary and an instance method take the places of a module's own, and a call pays nothing for them.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from kpt.transaction.copies import ours


class Listener(Protocol):
    """Who is told that a plan is stale for good, and why."""

    def ended(self, reason: str) -> str: ...


class HookDict(OrderedDict):  # type: ignore[type-arg]
    """A module's hook dictionary that tells its watch when a hook comes or goes.

    Copies and pickles are plain dictionaries.
    """

    watch: Listener | None = None
    path: str = ""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        if self.watch is not None:
            self.watch.ended(f"a hook was registered on {self.path or 'the model'}")

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> OrderedDict[Any, Any]:
        import copy

        return OrderedDict((key, copy.deepcopy(value, memo)) for key, value in self.items())

    def copy(self) -> OrderedDict[Any, Any]:  # type: ignore[override]
        return OrderedDict(self)


def restore_hooks(module: torch.nn.Module, name: str, original: Any) -> Callable[[], None]:
    def undo() -> None:
        current = module.__dict__.get(name)
        if isinstance(current, HookDict):
            current.watch = None
            # Handles of hooks that came meanwhile refer to the current dictionary weakly: with any
            # hook in it, it has to stay, as the plain dictionary that it is without a watch.
            if not current:
                module.__dict__[name] = original

    return undo


def restore_apply(module: torch.nn.Module) -> Callable[[], None]:
    def undo() -> None:
        apply_watchers.pop(module, None)
        current = module.__dict__.get("_apply")
        if isinstance(current, types.MethodType) and current.__func__ is apply:
            del module.__dict__["_apply"]

    return undo


#: A watch refers to its model's dictionaries, so that a strong reference here would keep both alive.
apply_watchers: MutableMapping[torch.nn.Module, weakref.ref[Listener]] = WeakIdKeyDictionary()


@ours
def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """``nn.Module._apply``, which ``.to()``, ``.half()`` and ``.cuda()`` go through, with a notice."""
    reference = apply_watchers.get(self)
    watch = reference() if reference is not None else None
    if watch is not None:
        watch.ended("the model was moved or converted (call kpt.refresh(model) to optimise it again)")
    return type(self)._apply(self, fn, recurse)


apply.__qualname__ = "_apply"
