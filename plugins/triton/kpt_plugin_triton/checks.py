"""What kernels refuse, said so that the caller can mend it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch

from kpt_plugin_triton.launch import INTERPRETED, is_recording

#: What every kernel computes in; sums and statistics are fp32 (fp64 for fp64).
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class KernelInputError(ValueError):
    """A kernel was called with an argument that it does not support."""


def refuse(op: str, argument: str, passed: str, supported: str) -> NoReturn:
    raise KernelInputError(f"{op}: {argument} is {passed}; supported: {supported}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    op: str, argument: str, value: object, dtypes: Collection[torch.dtype] = FLOATS, at_least: int = 1
) -> None:
    """``value`` is a tensor on a GPU (anywhere in the interpreter) of one of ``dtypes`` and at least so many
    dimensions.

    Raises:
        KernelInputError: it is not; names the argument, what was passed and what is supported.
    """
    if not isinstance(value, torch.Tensor):
        refuse(op, argument, f"a {type(value).__name__}", "a tensor")
    if not value.is_cuda and not INTERPRETED and not is_recording():
        refuse(
            op,
            argument,
            f"on device {value.device}",
            "a GPU tensor (CPU tensors only with TRITON_INTERPRET=1, for tests)",
        )
    if dtypes and value.dtype not in dtypes:
        refuse(op, argument, dtype_name(value.dtype), ", ".join(map(dtype_name, dtypes)))
    if value.dim() < at_least:
        refuse(op, argument, f"of {value.dim()} dimensions", f"at least {at_least}")


def check_shape(op: str, argument: str, value: torch.Tensor, expected: Sequence[int]) -> None:
    """``value`` has exactly the shape ``expected``; raises `KernelInputError` otherwise."""
    if value.shape != expected and tuple(value.shape) != tuple(expected):
        refuse(op, argument, f"of shape {tuple(value.shape)}", f"shape {tuple(expected)}")


def check_same_device(op: str, argument: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        refuse(op, argument, f"on {value.device}", f"the device of the first argument, {like.device}")


def check_weights(
    op: str, weight: Any, bias: Any, like: torch.Tensor, size: int, dtypes: Collection[torch.dtype]
) -> None:
    """``weight`` and ``bias`` are None or [size], of one of ``dtypes`` and on the device of ``like``.

    Raises:
        KernelInputError: one is not.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(op, name, vector, dtypes)
            check_shape(op, name, vector, (size,))
            check_same_device(op, name, vector, like)
