"""Where a model computes an op, and with which of its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kpt.ops.binding import Binding, same


@dataclass(frozen=True)
class Example:
    """What a site saw: each tensor's dtype name, shape and stride by the forward's parameter names.

    ``values`` are the other arguments of the call that are plain: numbers, strings, flags, None; ``callers``
    the names of those that are a module, as attention functions are given the one that calls them.
    """

    dtypes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    device: str
    values: Mapping[str, Any] = field(default_factory=dict)
    callers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a model that was proved to compute ``op``.

    ``kind`` is ``"module"`` (the forward of the module at ``path``), ``"function"`` (a function that
    this module's ``attribute`` calls, by the name ``callee``), ``"call"`` (a named torch call or an
    entry of a function table) or ``"graph"`` (``nodes`` of a captured graph, from ``inputs`` to
    ``outputs``). ``modes`` and ``dtypes`` are those it was proved for, ``examples`` what it saw when
    the model ran. ``others`` are the same place for calls that the examples do not show, each with a
    proof and a binding of its own; they serve what the site's own binding does not.
    """

    op: str
    path: str
    kind: str
    module: torch.nn.Module
    binding: Binding
    examples: tuple[Example, ...] = ()
    devices: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("inference", "training")
    dtypes: tuple[str, ...] = ()
    callee: str = ""
    attribute: str = "forward"
    original: Callable[..., Any] | None = None
    nodes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    others: tuple[Site, ...] = ()

    @property
    def name(self) -> str:
        """A name unique in the model, for receipts."""
        return f"{self.path or '(root)'}{':' + self.callee if self.callee else ''}"

    def arguments(self, /, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The op's arguments, by its reference's parameter names, for a call of this site.

        Raises `SiteMismatch` for a call unlike those that were proved.
        """
        return self.binding.collect(self.module, *args, **kwargs)

    def run(self, kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Serve a call with ``kernel`` and return what the site itself would have returned."""
        return self.binding.run(self.module, kernel, *args, **kwargs)

    def weights(self) -> dict[str, Any]:
        """The op's arguments that do not depend on the call: live parameters, epsilon, activation."""
        names = {*self.binding.signature.parameters, *self.binding.hypothesis.values}
        known: dict[str, Any] = {}
        for name, text in self.binding.arguments.items():
            code = compile(text, f"<kpt site {self.op}>", "eval")
            if not names.intersection(code.co_names):
                known[name] = eval(code, {"torch": torch, "self": self.module})
        return known

    def forward(
        self, kernel: Callable[..., Any], otherwise: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A forward that calls ``kernel``, to be set on a module instance as a bound method.

        ``otherwise(self, *args, **kwargs)`` serves calls outside the proof; the class's own forward
        by default.
        """
        return self.binding.forward(kernel, otherwise or type(self.module).forward)

    def at(self, root: torch.nn.Module) -> Site:
        """The same site in another copy of the model."""
        others = tuple(other.at(root) for other in self.others)
        return replace(self, module=root.get_submodule(self.path), others=others)

    def changed(self) -> str | None:
        """Why the proof no longer covers the module, or None while it does."""
        for path, expected in self.binding.guards.items():
            value: Any = self.module
            for part in path.split("."):
                value = getattr(value, part, None)
            if not same(value, expected):
                return f"{path} is {value!r}, and was {expected!r} when {self.op} was proved"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The site as plain data, for a receipt."""
        return {
            "op": self.op,
            "path": self.path,
            "kind": self.kind,
            "callee": self.callee,
            "modes": list(self.modes),
            "dtypes": list(self.dtypes),
            "binding": self.binding.to_dict(),
        }
