"""What comes before and after an int8 product, in C++ that this machine's compiler makes.

Written out, rounding a row to bytes is a dozen operations. Compilers fuse them, with the operations around
them; where a model runs without one each of them passes over memory, and this takes their place.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).parent / "native" / "int8.cpp"
DTYPES = (torch.float32, torch.bfloat16)


@functools.lru_cache(maxsize=1)
def _compiled() -> dict[tuple[str, torch.dtype], Callable[..., None]]:
    """The C functions; compiled when first needed, and kept in inductor's folder of compiled code.

    Raises:
        torch._inductor.exc.CppCompileError: the compiler failed.
    """
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(_SOURCE.read_text(encoding="utf-8"))
    functions = {}
    for name in ("quantize", "rescale"):
        for dtype in DTYPES:
            function = getattr(library, f"kpt_{name}_{str(dtype).removeprefix('torch.')}")
            function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int]
            function.restype = None
            functions[name, dtype] = function
    return functions


def ready() -> bool:
    """Whether the functions are compiled in this process."""
    return _compiled.cache_info().currsize > 0


def _threads(elements: int) -> int:
    """Threads for so many elements: waking others costs more than few elements do."""
    return min(torch.get_num_threads(), 1 + elements // 16384)


_library = torch.library.Library("kpt_cpu", "FRAGMENT")
_library.define(
    "quantize_rows(Tensor x, Tensor? inverse) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    "rescale_rows(Tensor product, Tensor scales, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _quantize_meta(x: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)


def _check(name: str, tensor: Tensor | None, elements: int) -> None:
    if tensor is None:
        return
    if tensor.dtype is not torch.float32 or tensor.shape != (elements,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; expected "
            f"contiguous float32 ({elements},)"
        )


def _quantize(x: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    _check("inverse", inverse, x.shape[1])
    codes, scales = _quantize_meta(x, inverse)
    rows, width = x.shape
    if x.numel():
        at = inverse.data_ptr() if inverse is not None else None
        places = (x.data_ptr(), at, codes.data_ptr(), scales.data_ptr())
        _compiled()["quantize", x.dtype](*places, rows, width, _threads(x.numel()))
    return codes, scales


def _rescale_meta(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty(product.shape, dtype=product.dtype, device=product.device)


def _rescale(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    product = product.contiguous()
    _check("scales", scales, product.shape[0])
    _check("bias", bias, product.shape[1])
    out = torch.empty_like(product)
    rows, width = product.shape
    if product.numel():
        at = bias.data_ptr() if bias is not None else None
        places = (product.data_ptr(), scales.data_ptr(), at, out.data_ptr())
        _compiled()["rescale", product.dtype](*places, rows, width, _threads(product.numel()))
    return out


_library.impl("quantize_rows", _quantize, "CPU")
_library.impl("quantize_rows", _quantize_meta, "Meta")
_library.impl("rescale_rows", _rescale, "CPU")
_library.impl("rescale_rows", _rescale_meta, "Meta")


def quantize_rows(x: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(uint8 codes [R, K] around 128, float32 scales [R]) of ``x`` [R, K], float32 or bfloat16.

    x[r, k] inverse[k] ~ scales[r] (codes[r, k] - 128), with the largest of a row at 127. A row with a NaN or
    an infinity has a scale of NaN. ``inverse`` [K] is float32, contiguous.

    Raises:
        ValueError: ``inverse`` is something else.
    """
    return torch.ops.kpt_cpu.quantize_rows(x, inverse)  # type: ignore[no-any-return]


def rescale_rows(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """product[r, n] scales[r] + bias[n] in the dtype of ``product`` [R, N].

    Raises:
        ValueError: ``scales`` [R] or ``bias`` [N] is not contiguous float32.
    """
    return torch.ops.kpt_cpu.rescale_rows(product, scales, bias)  # type: ignore[no-any-return]
