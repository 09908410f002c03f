"""A call that repeats the one before: the shortest way through a plan's guard.

What the guard's key is made of is asked of all tensors at once, by the comparison in C++ that torch.compile
guards its own code with (`torch._C._dynamo.guards.TensorGuards`): no key is made, and none looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

_Tensor = torch.Tensor
#: None where this torch has none, and no call a form: each is then looked up by its key.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_inference_mode = torch.is_inference_mode_enabled


class Again:
    """The form of a call that was served: named tensors, each another one, contiguous and real, nothing else.

    ``target`` is what it ran, ``grad`` whether gradients were recorded; ``places`` the names of the
    arguments that may be given by position.
    """

    __slots__ = ("_compared", "_inference", "_names", "_places", "grad", "target")

    def __init__(
        self,
        call: Mapping[str, torch.Tensor],
        target: Callable[..., Any],
        grad: bool,
        places: Sequence[str] = (),
    ) -> None:
        self._names = tuple(call)  # in their order: a forward may fold over its keywords
        #: How many arguments by position are such a call, and none where no number is.
        self._places = len(call) if self._names == tuple(places[: len(call)]) else 0
        self._compared = _guard(tuple(call.values()))
        self._inference = _inference_mode()
        self.target = target
        self.grad = grad

    @staticmethod
    def knows(call: Mapping[str, Any]) -> bool:
        """Whether calls like ``call`` have a form."""
        if not call or _TensorGuards is None or len(set(map(id, call.values()))) < len(call):
            return False
        return all(
            type(value) is _Tensor
            and value.layout is torch.strided
            and not value.is_nested
            and value.is_contiguous()
            and not value.dtype.is_complex
            and not value.is_neg()
            for value in call.values()
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The call by names if it is of this form, else None.

        Of this form are as many tensors, none of them given twice, under the same names in the same order,
        each contiguous, of the same type, sizes, dtype, device and need of a gradient as the first one's,
        with the same dispatch keys in the same inference mode.
        """
        values: Collection[Any] = args
        if args:
            if kwargs or len(args) != self._places:
                return None
        elif tuple(kwargs) == self._names:
            values = kwargs.values()
        else:
            return None
        if _inference_mode() is not self._inference:
            return None
        for value in values:
            # The comparison asks for strides, and the error of one that has none would end the process.
            if type(value) is not _Tensor or value.is_nested:
                return None
        if not self._compared(*values):
            return None
        if not args:
            return kwargs
        return {self._names[0]: args[0]} if self._places == 1 else dict(zip(self._names, args))


def _guard(tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool]:
    """The comparison with contiguous ``tensors``: strides that say nothing of that are left out."""
    sizes = [list(tensor.shape) for tensor in tensors]
    strides = [
        [
            stride if size > 1 and tensor.numel() else None
            for size, stride in zip(tensor.shape, tensor.stride())
        ]
        for tensor in tensors
    ]
    guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check
