"""A call that repeats the one before: the shortest way through a plan's guard.

What is asked of its tensors is what the guard's key is made of, compared one by one: no key is made, and
none looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_Tensor = torch.Tensor
_inference_mode = torch.is_inference_mode_enabled


class Again:
    """The form of a call that was served: named tensors, contiguous and real, and nothing else.

    ``target`` is what it ran, ``grad`` whether gradients were recorded.
    """

    __slots__ = ("_facts", "_inference", "grad", "target")

    def __init__(self, call: Mapping[str, torch.Tensor], target: Callable[..., Any], grad: bool) -> None:
        self._facts = {
            name: (value.shape, value.dtype, value.device, value.requires_grad)
            for name, value in call.items()
        }
        self._inference = _inference_mode()
        self.target = target
        self.grad = grad

    @staticmethod
    def knows(call: Mapping[str, Any]) -> bool:
        """Whether calls like ``call`` have a form."""
        return bool(call) and all(
            type(value) is _Tensor
            and value.is_contiguous()
            and not value.dtype.is_complex
            and not value.is_neg()
            for value in call.values()
        )

    def fits(self, call: Mapping[str, Any]) -> bool:
        """Whether ``call`` is of this form."""
        facts = self._facts
        if len(call) != len(facts) or _inference_mode() is not self._inference:
            return False
        try:
            for (name, value), (known, fact) in zip(call.items(), facts.items()):
                if name != known or type(value) is not _Tensor:  # a forward may fold over them in order
                    return False
                shape, dtype, device, requires_grad = fact
                if (
                    value.shape != shape
                    or value.dtype is not dtype
                    or value.requires_grad is not requires_grad
                    or value.device != device
                    or not value.is_contiguous()
                    or value.is_neg()
                ):
                    return False
        except RuntimeError:  # sparse rows and nested tensors know no contiguity or no shape
            return False
        return True
