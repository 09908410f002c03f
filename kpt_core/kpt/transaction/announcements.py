"""What torch announces to everybody, passed on to the watches whose models it concerns.

Parameters, buffers and modules that are registered, and the steps of optimizers: fused ones write parameters
in place without counting it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook


class Listener(Protocol):
    """Who is told."""

    def registered(self, module: torch.nn.Module, kind: str, name: str) -> None: ...

    def stepped(self, optimizer: torch.optim.Optimizer) -> None: ...


class Announcements:
    """torch's global hooks, present while somebody listens.

    Listeners that die with their models leave them, without effect, to the next `add` or `discard`: a
    collector may run while torch goes through these very hooks.
    """

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._handles: list[Any] = []

    def add(self, listener: Listener) -> None:
        self._listeners.add(listener)
        if not self._handles:
            self._handles = [
                torch_module.register_module_parameter_registration_hook(self._registered("parameter")),
                torch_module.register_module_buffer_registration_hook(self._registered("buffer")),
                torch_module.register_module_module_registration_hook(self._registered("module")),
                register_optimizer_step_post_hook(self._stepped),
            ]

    def discard(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        if not self._listeners:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _registered(self, kind: str) -> Callable[[torch.nn.Module, str, Any], None]:
        def told(module: torch.nn.Module, name: str, value: Any) -> None:
            for listener in tuple(self._listeners):
                listener.registered(module, kind, name)

        return told

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for listener in tuple(self._listeners):
            listener.stepped(optimizer)
