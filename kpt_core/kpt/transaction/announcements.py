"""What torch announces to everybody, passed on to the watches whose models it concerns.

Parameters, buffers and modules that are registered, and the steps of optimizers: fused ones write parameters
in place without counting it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Listener(Protocol):
    """Who is told."""

    def registered(self, module: torch.nn.Module, kind: str, name: str) -> None: ...

    def steps(self, parameters: Iterator[torch.Tensor]) -> None: ...


class Announcements:
    """torch's global hooks, present while somebody listens.

    Listeners that die with their models leave them, without effect, to the next `add` or `discard`: a
    collector may run while torch goes through these very hooks.
    """

    def __init__(self) -> None:
        #: Exchanged as a whole, since another thread may be going through it.
        self._listeners: tuple[weakref.ref[Listener], ...] = ()
        self._handles: list[Any] = []
        self._lock = threading.RLock()  # a collector or a signal may bring one in the midst of another

    def add(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = (*self._without(listener), weakref.ref(listener))
            if not self._handles:
                # One by one, so that an interruption leaves none that nobody knows.
                handles = self._handles = []
                handles += [torch_module.register_module_parameter_registration_hook(self._told("parameter"))]
                handles += [torch_module.register_module_buffer_registration_hook(self._told("buffer"))]
                handles += [torch_module.register_module_module_registration_hook(self._told("module"))]
                handles += [register_optimizer_step_pre_hook(self._steps)]

    def discard(self, listener: Listener) -> None:
        with self._lock:
            self._listeners = self._without(listener)
            if not self._listeners:
                handles, self._handles = self._handles, []
                for handle in handles:
                    handle.remove()

    def _without(self, listener: Listener) -> tuple[weakref.ref[Listener], ...]:
        return tuple(each for each in self._listeners if each() not in (None, listener))

    def _told(self, kind: str) -> Callable[[torch.nn.Module, str, Any], None]:
        def told(module: torch.nn.Module, name: str, value: Any) -> None:
            for each in self._listeners:
                if (listener := each()) is not None:
                    listener.registered(module, kind, name)

        return told

    def _steps(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for each in self._listeners:
            if (listener := each()) is not None:
                listener.steps(_uncounted(optimizer, args, kwargs))


def _uncounted(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[torch.Tensor]:
    """The parameters that a step is about to write, as far as it may not count that.

    torch's own optimizers leave alone what has no gradient, and count their writes unless they are fused.
    Gradients may come later than this: of a closure that the step is given, after ``optimizer`` itself, of a
    hook of the optimizer's own, or in whatever way somebody else's optimizer gets them.
    """
    own = type(optimizer).__module__.startswith("torch.optim.")
    later = not own or bool(optimizer._optimizer_step_pre_hooks)
    later = later or len(args) > 1 or kwargs.get("closure") is not None
    for group in optimizer.param_groups:
        if own and not group.get("fused"):
            continue
        for parameter in group["params"]:
            if parameter.grad is not None or (later and parameter.requires_grad):
                yield parameter
