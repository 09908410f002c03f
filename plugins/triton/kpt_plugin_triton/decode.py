"""Attention of few queries to many keys, as in generation: split over the keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.attention_checks import check_heads, check_scale
from kpt_plugin_triton.attention_forward import (
    LOG2E,
    Form,
    How,
    empty_heads,
    empty_stats,
    form_of,
    mask_strides,
    strides_of,
    with_plain_rows,
)
from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import decode as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import needs_grad, register
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

#: Queries up to which splitting over keys is considered, and keys from which it pays.
MOST_QUERIES, FEWEST_KEYS = 16, 512
_MOST_ROWS = 128
#: Parts that are considered where there are more heads than run side by side.
_SEVERAL = 8

_split = Kernel(device.decode_split)
_merge = Kernel(device.decode_merge)


def _rule(itemsize: int, head: int, rows: int) -> dict[str, int]:
    block = 64 if head <= 128 else 32
    if itemsize == 4:
        return {"BLOCK_N": 16, "PROGRAMS": 2, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": block, "PROGRAMS": 2, "num_warps": 4 if rows <= 64 else 8, "num_stages": 2}


def _candidates(itemsize: int, head: int, rows: int) -> Iterator[dict[str, int]]:
    if itemsize == 4:
        return
    for block in (16, 32, 64, 128):
        for warps in (1, 2, 4, 8):
            for stages in (1, 2, 3, 4):
                for programs in (1, 2, 4, 8):
                    kept = 2 * stages * block * head * itemsize * programs
                    if kept <= 220_000 and rows * head // (32 * warps) <= 128 and block >= 4 * warps:
                        yield {
                            "BLOCK_N": block,
                            "PROGRAMS": programs,
                            "num_warps": warps,
                            "num_stages": stages,
                        }


split_options = Tuned("decode_split", ("head", "rows"), _rule, _candidates, reach=1.0)


@functools.lru_cache(maxsize=1024)
def parts_of(blocks: int, pairs: int, at_once: int) -> int:
    """Into how many parts the ``blocks`` of keys of each of ``pairs`` heads go.

    Parts are equally long and ``at_once`` of them run side by side, so that one part more than fits takes as
    long as all the others together: the fewest parts with which the last one ends first.
    """

    def ends(parts: int) -> int:
        return ceil_div(parts * pairs, at_once) * ceil_div(blocks, parts)

    most = max(_SEVERAL, ceil_div(at_once, pairs))
    return min(range(1, min(most, blocks) + 1), key=ends)


def takes(form: Form, how: How) -> bool:
    """Whether a dense call is one for these kernels."""
    return (
        not form.packed
        and form.lists is None
        and not how.causal
        and how.window is None
        and form.q_len <= MOST_QUERIES
        and form.k_len >= FEWEST_KEYS
        and form.q_len * (form.heads // form.key_heads) <= _MOST_ROWS
    )


def run_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    form: Form,
    how: How,
    want_stats: bool,
    lengths: torch.Tensor | None = None,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `run_forward`, for calls that `takes`; ``lengths`` [B]: see `decode_attention`."""
    out = empty_heads(q, form.head_v)
    q, k, v = with_plain_rows(q), with_plain_rows(k), with_plain_rows(v)
    stats = empty_stats(q, form.additive) if want_stats else None
    if out.numel() == 0 or k.numel() == 0:
        if stats is not None:
            stats.fill_(float("inf"))
        return out.zero_(), stats
    block_d, block_v = max(16, power_of_two(form.head)), max(16, power_of_two(form.head_v))
    group = form.heads // form.key_heads
    rows = max(16, power_of_two(group * form.q_len))
    index = q.device.index
    if options is None:
        options = split_options(index, q.element_size(), max(block_d, block_v), rows)
    block, pairs = options["BLOCK_N"], form.batch * form.key_heads
    blocks = ceil_div(form.k_len, block)
    each = ceil_div(blocks, parts_of(blocks, pairs, options["PROGRAMS"] * processors(index))) * block
    splits = ceil_div(form.k_len, each)
    all_rows = form.batch * form.heads * form.q_len
    space = torch.empty(splits * all_rows * (form.head_v + 2), dtype=torch.float32, device=q.device)
    part, peaks, totals = space.split([splits * all_rows * form.head_v, splits * all_rows, splits * all_rows])
    mask = form.mask
    by_row = mask is not None and (mask.stride(2) != 0 or mask.stride(1) != 0)
    _split(
        (splits * pairs, 1, 1),
        (
            *(q, k, v, mask, lengths, part, peaks, totals, form.key_heads, form.q_len, form.k_len),
            *(each, splits, *strides_of(q), *strides_of(k), *strides_of(v), *mask_strides(mask)),
            *(how.scale * LOG2E, how.softcap or 0.0),
        ),
        (form.head, form.head_v, block_d, block_v, group, how.softcap is not None, by_row, rows, block),
        options["num_warps"],
        options["num_stages"],
    )
    _merge(
        (all_rows, 1, 1),
        (
            *(part, peaks, totals, sinks, out, stats, form.heads, form.q_len, splits, *strides_of(out)),
            all_rows,
        ),
        (form.head_v, block_v, max(4, min(power_of_two(splits), 2048 // block_v)), form.additive),
        4,
    )
    return out, stats


def _op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    how = How(False, None, scale, softcap)
    return run_decode(q, k, v, sinks, form_of(q, k, v), how, False, lengths)[0]


def _fake(q: Any, k: Any, v: Any, lengths: Any, sinks: Any, scale: float, softcap: float | None) -> Any:
    return empty_heads(q, v.shape[-1])


decode_op = register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? sinks, float scale, "
    "float? softcap) -> Tensor",
    _op,
    _fake,
)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the last queries (B, H, S, D) to a cache ``k`` (B, Hkv, L, D) and ``v`` (B, Hkv, L, Dv).

    ``lengths`` (B,) integers: how many entries of the cache are filled, the queries' own included; query i
    sees the first ``lengths - S + 1 + i`` keys. They stay on the device: nothing waits for them, and a
    captured graph follows them. Without lengths every query sees all L keys. S x H / Hkv may be 128 at most.
    bf16, fp16 or fp32; not differentiable. Other arguments as for `attention`.

    Raises:
        KernelInputError: an argument's device, dtype, shape or gradient is not supported.
    """
    name = "decode_attention"
    check_heads(name, q, k, v, 4)
    if needs_grad(q, k, v, sinks):
        refuse(name, "q, k, v or sinks", "in need of a gradient", "no gradients; use attention for training")
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    if rows > _MOST_ROWS:
        refuse(name, "q", f"of {rows} rows for each key head", f"at most {_MOST_ROWS}")
    if lengths is not None:
        check_tensor(name, "lengths", lengths, (torch.int32, torch.int64))
        check_shape(name, "lengths", lengths, q.shape[:1])
        check_same_device(name, "lengths", lengths, q)
        lengths = lengths.contiguous()
    factor = check_scale(name, q, scale, softcap, sinks)
    sinks = None if sinks is None else sinks.contiguous()
    call = decode_op if torch.compiler.is_compiling() else _op
    return call(q, k, v, lengths, sinks, factor, softcap)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, head: int, rows: int) -> Callable[[Options], Callable[[], Any]]:
    """32k keys of 8 heads, one sequence: the case that is bound by reading keys and values."""
    k = torch.randn(1, 8, 32768, head, dtype=dtype, device=work_device())
    v = torch.randn_like(k)
    q = torch.randn(1, 8 * rows, 1, head, dtype=dtype, device=work_device())
    form, how = form_of(q, k, v), How(False, None, head**-0.5, None)

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: run_decode(q, k, v, None, form, how, False, None, options)

    return with_options


WORKLOADS = [
    Workload(split_options, ((64, 16), (128, 16), (128, 64), (256, 16)), _work, (torch.bfloat16,)),
]
