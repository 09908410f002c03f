"""The catalogue: every op that is known, ours and those of plugins."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt.specs import OpSpec

#: One module a family. Order matters only for reading.
_FAMILIES = ("linear", "norms", "mlp", "rope", "attention", "softmax", "loss")


@lru_cache(maxsize=1)
def _own() -> dict[str, OpSpec]:
    return {
        spec.name: spec
        for family in _FAMILIES
        for spec in import_module(f"kpt.ops.references.{family}").SPECS
    }


def catalogue(registry: Any = None) -> dict[str, OpSpec]:
    """Every op by name: the core's own, then those of the plugins in ``registry``.

    A plugin cannot redefine an op of the core; such a spec is ignored here and reported by the
    plugin loader as a conflict.
    """
    found = dict(_own())
    if registry is not None:
        for registered in registry.specs("kpt_ops"):
            found.setdefault(registered.spec.name, registered.spec)
    return found


@lru_cache(maxsize=256)
def _loaded(text: str) -> Any:
    home, _, name = text.partition(":")
    if not name:
        raise ValueError(f"{text!r} is not of the form 'module:attr'")
    value: Any = import_module(home)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def reference(name: str, registry: Any = None) -> Callable[..., Any]:
    """The reference of an op: plain PyTorch, in fp64 if its inputs are; its signature is the op's."""
    specs = catalogue(registry)
    if name not in specs:
        raise KeyError(f"no op is named {name!r}; known are {', '.join(sorted(specs))}")
    function: Callable[..., Any] = _loaded(specs[name].reference)
    return function


def recognisers(registry: Any = None) -> list[Any]:
    """The recognisers of the catalogue, each once, as objects with ``hypotheses(module, captured)``."""
    texts = dict.fromkeys(spec.recogniser for spec in catalogue(registry).values() if spec.recogniser)
    return [_recogniser(text) for text in texts]


@lru_cache(maxsize=256)
def _recogniser(text: str) -> Any:
    value = _loaded(text)
    if inspect.isclass(value):
        value = value()
    return value
