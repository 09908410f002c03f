"""The code that a model runs and shares with others: methods of classes, functions of modules.

A pass may change instances of its own copy. What it assigns to a class or to a library's module changes
every model of the process, the untouched one that it is compared with included.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

_DESCRIPTORS = (property, classmethod, staticmethod)
#: What torch's compiler replaces in `torch.nn.Module` when it is first used.
_OF_TORCH = frozenset({"__init__", "__setstate__"})
#: What torch's compiler puts among the globals of code that it compiled, and takes away when that dies: a
#: user's compiled model that is collected during a trial is no change, and is not to be revived.
_OF_COMPILER = ("__compiled_fn", "__resume_at")
_MISSING = object()
#: What every forward may call. Their other names (modules, constants) are not code.
_SHARED: dict[str, ModuleType] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
}


@dataclass(frozen=True)
class _Owner:
    """A class or a module, with the functions that it held."""

    name: str
    value: Any
    held: dict[str, Any]
    #: Names that the class inherits: one of them set on the class itself takes another's place.
    inherited: frozenset[str]

    def changes(self) -> Iterator[tuple[str, str]]:
        """The names whose function is another one now, and what became of it."""
        now = vars(self.value)
        for name, before in self.held.items():
            if now.get(name) is not before:
                yield name, "replaced" if name in now else "removed"
        for name in self.inherited & now.keys():
            if _is_code(now[name]):
                yield name, "set"


class CodeState:
    """The methods of a model's classes and their bases, the functions of the modules that define them, and
    torch's own functions, as they are at construction."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Its first import exchanges `torch.manual_seed`, which would be taken for a trace of who compiles.
        importlib.import_module("torch._dynamo")
        classes = dict.fromkeys(
            base for module in model.modules() for base in type(module).__mro__ if base is not object
        )
        classes[torch.Tensor] = None
        namespaces = dict(_SHARED)
        for cls in classes:
            module = sys.modules.get(cls.__module__)
            if isinstance(module, ModuleType) and cls.__module__.split(".")[0] != "torch":
                namespaces[cls.__module__] = module
        self._owners = [
            _Owner(f"{cls.__module__}.{cls.__qualname__}", cls, _code_of(cls), _inherited(cls))
            for cls in classes
        ]
        self._owners += [
            _Owner(name, value, _code_of(value), frozenset()) for name, value in namespaces.items()
        ]

    def differences(self) -> list[str]:
        """The full names of what is another function now."""
        return [f"{owner.name}.{name} {what}" for owner in self._owners for name, what in owner.changes()]

    def restore(self) -> None:
        """Put every function back."""
        for owner in self._owners:
            for name, _ in list(owner.changes()):
                before = owner.held.get(name, _MISSING)
                if before is _MISSING:
                    delattr(owner.value, name)
                else:
                    setattr(owner.value, name, before)


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, _DESCRIPTORS)


def _code_of(owner: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in _OF_TORCH and not name.startswith(_OF_COMPILER) and _is_code(value)
    }


def _inherited(cls: type) -> frozenset[str]:
    found = {name for base in cls.__mro__[1:-1] for name, value in vars(base).items() if _is_code(value)}
    return frozenset(found - vars(cls).keys() - _OF_TORCH)
