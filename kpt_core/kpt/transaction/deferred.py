"""Optimising on the first real call, when no example inputs were given."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from kpt.error_text import described
from kpt.judge.calls import Call
from kpt.transaction import dispatch
from kpt.transaction.ambient import default_devices, transformed
from kpt.transaction.signature import Canonical

#: Set while a run is under way: calls of other models that wait are answered and not observed.
searching = threading.Event()


class Deferred:
    """Stands where a plan will stand, until a call can be observed.

    The first call is answered by the original forward; then ``start(model, call)`` runs. A call made
    while something traces the model, inside checkpoint recomputation, or while a search runs is
    answered and not observed.
    """

    def __init__(self, model: torch.nn.Module, start: Callable[[torch.nn.Module, Any], Any]) -> None:
        self.previous = dispatch.own_forward(model)
        self._start = start
        self._lock = threading.Lock()
        self._uninstall: Callable[[], None] | None = None
        self.committed = self
        self._uninstall = dispatch.install(model, self)

    def original(self, model: torch.nn.Module) -> Callable[..., Any]:
        return self.previous if self.previous is not None else dispatch.forward_of_class(model)

    def take_back(self) -> list[str]:
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
        return []

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = self.original(model)
        if _unobservable() or not self._lock.acquire(blocking=False):
            return original(*args, **kwargs)
        try:
            try:
                call = Call(*Canonical(original)(args, kwargs)).clone()
            except Exception:  # noqa: BLE001 - a call that eager itself will refuse, or that cannot be copied
                return original(*args, **kwargs)
            output = original(*args, **kwargs)
            if self._uninstall is not None and not searching.is_set():
                self._observe(model, call)
            return output
        finally:
            self._lock.release()

    def _observe(self, model: torch.nn.Module, call: Call) -> None:
        """Start the run; the user's call has its answer and does not fail because of it."""
        try:
            self._start(model, _outside_inference_mode(call))
        except Exception as error:  # noqa: BLE001 - told to the user, who gets eager's output all the same
            warnings.warn(f"{type(model).__name__} was not optimised: {described(error)}", stacklevel=4)


def _unobservable() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or default_devices() is None
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
        or torch._C._current_graph_task_id() != -1
        # Checkpointing counts what a forward saves, so that it has to be the same forward the second time.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def _outside_inference_mode(call: Call) -> Call:
    """Tensors made in inference mode cannot be used where gradients may be recorded."""
    with torch.inference_mode(False):
        return call.map_tensors(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
