"""A call that repeats the one before: the shortest way through a plan's guard.

What the guard's key is made of is asked of all tensors at once, by the comparison in C++ that torch.compile
guards its own code with (`torch._C._dynamo.guards.TensorGuards`): no key is made, and none looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

_Tensor = torch.Tensor
#: None where this torch has none, and no call a form: each is then looked up by its key.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)


class Again:
    """The form of a call that was served: named tensors, contiguous and real, and nothing else.

    ``target`` is what it ran, ``grad`` whether gradients were recorded; ``places`` the names of the
    arguments that may be given by position.
    """

    __slots__ = ("_alike", "_names", "_places", "grad", "target")

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
        self._alike = _guard(tuple(call.values()))
        self.target = target
        self.grad = grad

    @staticmethod
    def knows(call: Mapping[str, Any]) -> bool:
        """Whether calls like ``call`` have a form."""
        if _TensorGuards is None:
            return False
        return bool(call) and all(
            type(value) is _Tensor
            and value.layout is torch.strided
            and value.is_contiguous()
            and not value.dtype.is_complex
            and not value.is_neg()
            for value in call.values()
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The call by names if it is of this form, else None.

        Of this form are as many tensors, none of them given twice, under the same names in the same order,
        each of the same type, sizes, strides, dtype, device and need of a gradient as the first one's, with
        the same dispatch keys in the same inference mode.
        """
        if not args:
            return kwargs if tuple(kwargs) == self._names and self._alike(*kwargs.values()) else None
        if kwargs or len(args) != self._places or not self._alike(*args):
            return None
        return dict(zip(self._names, args))


def _guard(tensors: tuple[torch.Tensor, ...]) -> Callable[..., bool]:
    sizes = [list(tensor.shape) for tensor in tensors]
    strides = [list(tensor.stride()) for tensor in tensors]
    guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check
