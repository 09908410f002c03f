"""Poison: memory that was never written shows up as NaN instead of as last call's right answer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::empty_permuted",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
#: All bits set: NaN in every IEEE format (fp8 included), -1 as an integer.
NAN_BYTE = 0xFF
#: Blocks of each size that are poisoned: an allocator hands out the last one freed, and a call may
#: need several of a size.
_BLOCKS = 4


def poison(tensor: torch.Tensor, fill: float = math.nan) -> torch.Tensor:
    """Fill ``tensor`` with ``fill`` and return it; for NaN, integers get the largest value of their type."""
    if not math.isnan(fill):
        return tensor.fill_(fill)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(fill)
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    try:
        return tensor.fill_(torch.iinfo(tensor.dtype).max)
    except TypeError:  # quantised and other exotic dtypes have no such value
        return tensor


class PoisonMode(TorchDispatchMode):
    """Fill what ``torch.empty`` and its relatives return, and what ``resize_`` adds, with ``poison``.

    It sees allocations of Python code, not those inside a custom operator; `poisoned_memory` and
    `poisoned_everywhere` reach these.
    """

    def __init__(self, fill: float = math.nan) -> None:
        super().__init__()
        self.fill = fill

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::resize_":
            return _poisoned_resize(func, args, kwargs or {}, self.fill)
        result = func(*args, **(kwargs or {}))
        if name in _ALLOCATIONS and isinstance(result, torch.Tensor) and result.device.type != "meta":
            poison(result, self.fill)
        return result


def _poisoned_resize(func: Any, args: Any, kwargs: Any, fill: float) -> torch.Tensor:
    tensor = args[0]
    before = tensor.numel()
    result = func(*args, **kwargs)
    if result.numel() > before and result.is_contiguous():
        poison(result.view(-1)[before:], fill)
    return result


def poisoned_memory(like: Iterable[torch.Tensor], byte: int = NAN_BYTE) -> None:
    """Fill free memory of the sizes of ``like`` with ``byte``, so that the next allocations get it.

    A caching allocator reuses freed blocks of a size, and so does malloc in general.
    """
    sizes = {
        (tensor.numel() * tensor.element_size(), tensor.device)
        for tensor in like
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel()
    }
    for size, device in sizes:
        blocks = [torch.full((size,), byte, dtype=torch.uint8, device=device) for _ in range(_BLOCKS)]
        del blocks


@contextmanager
def poisoned(like: Iterable[torch.Tensor] = (), fill: float = math.nan) -> Iterator[None]:
    """Poison allocations made inside, and free memory of the sizes of ``like`` (the expected outputs).

    With a ``fill`` of 0 memory is cleared instead, which tells what was not written from what is NaN.
    """
    poisoned_memory(like, NAN_BYTE if math.isnan(fill) else 0)
    with PoisonMode(fill):
        yield


@contextmanager
def poisoned_everywhere() -> Iterator[None]:
    """Have torch itself fill every uninitialised tensor, also inside custom operators.

    This is torch's deterministic mode with its warnings off: algorithms may differ inside, and code
    compiled before is compiled again. So it serves single kernels, not plans.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
