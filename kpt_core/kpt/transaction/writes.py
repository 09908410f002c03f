"""Notices that one of many tensors was written in place, by the counters that torch keeps of writes.

Reading a counter as ``tensor._version`` takes torch's Python bindings about 0.06 µs. Autograd compares the
same counters whenever somebody reads what was saved for a backward, in half the time: so the tensors are
saved for a backward that never comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch

_version = attrgetter("_version")
_hooks_on_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Writes:
    """Whether one of ``tensors`` was written in place since construction, or since `settle`.

    A write that torch does not count is not noticed: through ``.data``, by a fused optimizer, or through
    memory that NumPy shares. Autograd gets aliases, in which no collector has to see: hooks of a tensor may
    lead to whoever holds this.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        self.settle()

    def settle(self) -> None:
        """Take all counters as they are now."""
        quick = [tensor for tensor in self.tensors if _is_plain(tensor)] if _saved_as_they_are() else []
        self._output = _saved_for_backward(quick) if quick else None
        self._node: Any = self._output.grad_fn if self._output is not None else None
        saved = set(map(id, quick))
        self._others = [tensor for tensor in self.tensors if id(tensor) not in saved]
        self._versions = list(map(_version, self._others))

    def forget(self) -> None:
        """Compare nothing any more, and let go of the aliases: they keep memory that a tensor had before."""
        self.tensors, self._others, self._versions = [], [], []
        self._output = self._node = None

    def happened(self) -> bool:
        """Whether a counter moved."""
        node = self._node
        if node is not None:
            try:
                node.saved_tensors  # noqa: B018 - the comparison is what reading it does
            except RuntimeError:
                return True
        return bool(self._others) and list(map(_version, self._others)) != self._versions


class _Saved(torch.autograd.Function):
    """Saves its inputs for a backward, which it has none of."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()


def _saved_for_backward(tensors: list[torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        anchor = torch.zeros((), device="cpu", requires_grad=True)
        return _Saved.apply(anchor, *(tensor.detach() for tensor in tensors))  # type: ignore[no-any-return]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a single tensor, of which an alias surely shares the counter."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided


def _saved_as_they_are() -> bool:
    """Whether nobody's hooks get what is saved for a backward (to keep it elsewhere, say)."""
    return _hooks_on_saved is not None and _hooks_on_saved(True) is None
