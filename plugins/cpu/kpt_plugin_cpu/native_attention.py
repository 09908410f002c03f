"""Attention for CPUs in C++, compiled on this machine by inductor's own tool chain.

torch's fused attention for CPUs multiplies in tiles that are small, by MKL in fp32, which is slow on CPUs
of other vendors: on a Zen 5 core it took 0.58 ms for 12 heads x 128 x 64 and 2.8 ms for 24 x 197 x 64,
where this takes 0.24 and 1.2. In bf16 it took 0.67 and 3.0, written out for inductor 0.33 and 1.1, this
0.19 and 0.90.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kpt_plugin_cpu.inductor import compiler

if TYPE_CHECKING:
    from kpt.ops.sites import Site

#: Features of a head up to which a panel of queries stays in the cache.
LARGEST_HEAD = 256
_SOURCE = Path(__file__).parent / "native" / "attention.cpp"
_DTYPES = (torch.float32, torch.bfloat16)
_BOOL, _ADDED = 1, 2


@functools.lru_cache(maxsize=1)
def _compiled() -> dict[torch.dtype, Callable[..., None]]:
    """The C functions; compiled when first needed, and kept in inductor's folder of compiled code.

    Raises:
        torch._inductor.exc.CppCompileError: the compiler failed.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    # Products and sums have to become single instructions, which inductor forbids by default.
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        library = CppCodeCache.load(_SOURCE.read_text(encoding="utf-8"))
    functions = {}
    for dtype in _DTYPES:
        function = getattr(library, f"kpt_attention_{str(dtype).removeprefix('torch.')}")
        function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_double, ctypes.c_int]
        function.restype = None
        functions[dtype] = function
    return functions


def supports(site: Site) -> str | None:
    """The reason why a site cannot be served, or None."""
    if compiler() is None:
        return "no C++ compiler was found (g++ or clang++, or the one named by CXX)"
    for name in ("softcap", "sinks", "window"):
        if name in site.binding.arguments:
            return f"the site has {name}, which this kernel has not"
    for example in site.examples:
        for name in ("q", "k", "v"):
            shape = example.shapes.get(name, ())
            if len(shape) == 4 and shape[-1] > LARGEST_HEAD:
                return f"{name} has {shape[-1]} features; this kernel takes up to {LARGEST_HEAD}"
            if example.dtypes.get(name, "float32") not in ("float32", "bfloat16"):
                return f"the site is in {example.dtypes[name]}; this kernel takes float32 and bfloat16"
        if example.shapes.get("q", (0,))[-1] % 2:
            return f"q has {example.shapes['q'][-1]} features; this kernel takes even numbers"
        if example.dtypes.get("mask", "bool") not in ("bool", "float32", "bfloat16"):
            return f"the mask is {example.dtypes['mask']}; this kernel takes bool, float32 and bfloat16"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of ``q`` [B, H, S, D] over ``k`` [B, Hkv, L, D] and ``v`` [B, Hkv, L, Dv].

    The op's own meaning, without soft cap, sinks and window, in fp32 or bf16; D is even in bf16. Any
    strides; features that are not innermost are copied first. The result [B, H, S, Dv] is a view of
    [B, S, H, Dv], as models need it next.

    Raises:
        ValueError: an argument is given that this kernel has not, or sizes do not fit.
        TypeError: a dtype or device that it does not take.
    """
    for name, value in (("softcap", softcap), ("sinks", sinks), ("window", window)):
        if value is not None:
            raise ValueError(f"{name} was passed; this kernel computes attention without it")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in _DTYPES or tensor.device.type != "cpu":
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected float32 or bfloat16 on the CPU"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and q {q.dtype}; expected one dtype")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions; expected 4: batch, heads, rows, features"
            )
        if tensor.shape[-1] > LARGEST_HEAD:
            raise ValueError(f"{name} has {tensor.shape[-1]} features; expected at most {LARGEST_HEAD}")
    if mask is not None and mask.dtype not in (torch.bool, *_DTYPES):
        raise TypeError(f"mask is {mask.dtype}; expected bool (True keeps), or float32 or bfloat16 (added)")
    if q.dtype is torch.bfloat16 and q.shape[3] % 2:
        raise ValueError(f"q has {q.shape[3]} features; expected an even number in bfloat16")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} do not fit q {list(q.shape)}: batches, keys and "
            "features must agree"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} of k")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.kpt_cpu.attention(q, k, v, mask, is_causal, factor)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# The op that compilers see

_library = torch.library.Library("kpt_cpu", "FRAGMENT")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _meta(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return _output(q, v)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    out = _output(q, v)
    if out.numel() == 0:
        return out
    if k.shape[2] == 0:
        return out.zero_()
    q, k, v = _rows(q), _rows(k), _rows(v)
    kind, mask_strides, mask_at = 0, (0, 0, 0, 0), None
    if mask is not None:
        kind = _BOOL if mask.dtype is torch.bool else _ADDED
        mask = mask if mask.dtype is torch.bool else mask.float()
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        mask_strides, mask_at = mask.stride(), mask.data_ptr()
    batch, heads, queries, features = q.shape
    key_heads, keys, value_features = k.shape[1], k.shape[2], v.shape[3]
    integers = (ctypes.c_int64 * 25)(
        *(batch, heads, key_heads, queries, keys, features, value_features, is_causal, kind),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *mask_strides,
    )
    places: tuple[Any, ...] = (q.data_ptr(), k.data_ptr(), v.data_ptr(), mask_at, out.data_ptr())
    _compiled()[q.dtype](*places, ctypes.addressof(integers), scale, torch.get_num_threads())
    return out


_library.impl("attention", _run, "CPU")
_library.impl("attention", _meta, "Meta")
