"""What every form of attention shares: sizes and strides, options, and the launch of the forward kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from kpt_plugin_triton import attention_hopper
from kpt_plugin_triton.kernels import attention as device
from kpt_plugin_triton.launch import Kernel, ceil_div, chip, power_of_two
from kpt_plugin_triton.tuning import Options, Tuned

LOG2E = 1.4426950408889634
#: Keys and values of the heads that run side by side should fit into the L2 cache with room to spare.
_SECTION_BYTES = 16 * 2**20

_forward = Kernel(device.attention_forward)


class How(NamedTuple):
    """The scalars of an attention call; ``window`` counts keys up to the query's own."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None


class Lists(NamedTuple):
    """Kept blocks of a block mask.

    ``kept`` [lists, rows, width] int32: numbers of key blocks by query block, those seen in full first;
    ``counts`` [lists, rows, 2] int32: how many are seen in full, and how many in all. ``by_key`` the same
    with the roles of keys and queries exchanged. ``strides``: lists from one batch entry and from one head
    to the next, in query blocks and in key blocks. ``size``: queries and keys of one block.
    """

    kept: torch.Tensor
    counts: torch.Tensor
    kept_by_key: torch.Tensor
    counts_by_key: torch.Tensor
    strides: tuple[int, int]
    strides_by_key: tuple[int, int]
    size: tuple[int, int]


class Form(NamedTuple):
    """Sizes of a call, dense [B, H, S, D] or packed [T, H, D] with ``starts``; mask and lists, if any."""

    batch: int
    heads: int
    key_heads: int
    q_len: int
    k_len: int
    head: int
    head_v: int
    mask: torch.Tensor | None
    starts_q: torch.Tensor | None
    starts_k: torch.Tensor | None
    lists: Lists | None

    @property
    def packed(self) -> bool:
        return self.starts_q is not None

    @property
    def additive(self) -> bool:
        return self.mask is not None and self.mask.dtype != torch.uint8


def form_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    starts_q: torch.Tensor | None = None,
    starts_k: torch.Tensor | None = None,
    longest: tuple[int, int] = (0, 0),
    lists: Lists | None = None,
) -> Form:
    """The `Form` of a call; a mask is expanded to [B, H, S, L], a bool one seen as bytes."""
    if starts_q is not None:
        _, heads, head = q.shape
        batch, q_len, k_len = starts_q.shape[0] - 1, *longest
    else:
        batch, heads, q_len, head = q.shape
        k_len = k.shape[2]
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, k_len)
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
    sizes = (batch, heads, k.shape[1], q_len, k_len, head, v.shape[-1])
    return Form(*sizes, mask, starts_q, starts_k, lists)


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Elements from one batch entry, head and row to the next; [T, H, D] has no batch entries."""
    if x.dim() == 3:
        return 0, x.stride(1), x.stride(0)
    return x.stride(0), x.stride(1), x.stride(2)


def with_plain_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with features side by side; a view wherever they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_heads(x: torch.Tensor, features: int) -> torch.Tensor:
    """Uninitialised, dense, like ``x`` but for the last axis; heads inside of rows if ``x`` has them so."""
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        batch, heads, rows, _ = x.shape
        return x.new_empty((batch, rows, heads, features)).transpose(1, 2)
    return x.new_empty((*x.shape[:-1], features))


def empty_stats(q: torch.Tensor, additive: bool) -> torch.Tensor:
    """[H, T] or [B, H, S] in fp32, twice if there is an additive mask; see the kernel."""
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else tuple(q.shape[:3])
    return q.new_empty((2, *shape) if additive else (1, *shape), dtype=torch.float32)


def stats_strides(stats: torch.Tensor) -> tuple[int, int, int]:
    """Elements to the next batch entry, to the next head, and to the second half."""
    if stats.dim() == 3:
        return 0, stats.shape[2], stats[0].numel()
    return stats.shape[2] * stats.shape[3], stats.shape[3], stats[0].numel()


def mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if mask is None else tuple(mask.stride())  # type: ignore[return-value]


def window_of(form: Form, how: How) -> int:
    """The window in 32 bits: one as long as the queries hides nothing that causality does not."""
    return min(how.window or 0, form.q_len)


def section_of(heads_of_one: int, length: int, row_bytes: int, heads: int) -> int:
    """How many heads run side by side; ``heads_of_one`` of them read the same rows."""
    return max(1, min(heads, heads_of_one * max(1, _SECTION_BYTES // max(1, length * row_bytes))))


# ---------------------------------------------------------------------------------------------
# Options

#: Kinds of calls that are tuned apart, as sizes too far from each other to be mixed up.
PLAIN, CAUSAL, MASKED, LISTED, WINDOWED = 1, 8, 64, 512, 4096


def kind_of(form: Form, how: How) -> int:
    if form.lists is not None:
        return LISTED
    if form.mask is not None:
        return MASKED
    if how.window is not None:
        return WINDOWED
    return CAUSAL if how.causal else PLAIN


def forward_rule(itemsize: int, head: int, kind: int) -> dict[str, int]:
    on = chip()
    hopper = on == 90 and itemsize == 2
    if itemsize == 4:  # no matrix units for fp32: small tiles, so that registers suffice
        found = tiles(32, 32 if head <= 128 else 16, 8 if on and head > 64 else 4, 1)
    elif hopper and head <= 128 and kind in (PLAIN, CAUSAL, WINDOWED):
        found = tiles(128, 128, 8, 2)
    elif head > 128:
        found = tiles(64, 32, 8 if on else 4, 2)
    elif kind == MASKED:
        found = tiles(128 if head > 64 else 64, 64, 8 if head > 64 else 4, 2)
    else:  # three loops, a window's, take more registers
        found = tiles(128, 64, 8 if head > 64 or (on and kind == WINDOWED) else 4, 2)
    if not on and kind == WINDOWED:
        found["num_stages"] = 1  # its bounds are too many scalars beside those of pipelined loads
    return {**found, "SPLIT": int(on > 0), "DESCRIPTORS": int(hopper and kind != LISTED)}


def tiles(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": queries, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


def forward_candidates(itemsize: int, head: int, kind: int) -> Iterator[dict[str, int]]:
    if itemsize == 4:
        return
    hopper = chip() == 90
    for rows in (64, 128, 256):
        for columns in (32, 64, 128):
            for warps in (4, 8):
                if rows // warps < 8:
                    continue
                for stages in (2, 3, 4):
                    for descriptors in (0, 1) if hopper else (0,):
                        shared = (rows + 2 * stages * columns) * head * itemsize
                        if shared > 232_448:
                            continue
                        base = {
                            "BLOCK_M": rows,
                            "BLOCK_N": columns,
                            "num_warps": warps,
                            "num_stages": stages,
                            "DESCRIPTORS": descriptors,
                        }
                        # Sums of 128 registers a thread leave 64 for scores, on Hopper.
                        most = 128 if hopper and columns <= 64 else 64
                        if rows * max(head, columns) // (32 * warps) <= most:
                            yield {**base, "SPLIT": 1}


forward_options = Tuned("attention_forward", ("head", "kind"), forward_rule, forward_candidates, reach=1.0)


def described(options: Options, *tensors: torch.Tensor) -> bool:
    """Whether these tensors can be read through descriptors: 16-byte addresses and strides."""
    if not options["DESCRIPTORS"]:
        return False
    for x in tensors:
        size = x.element_size()
        _, head_step, row_step = strides_of(x)
        if x.shape[-1] * size < 16 or x.data_ptr() & 15 or row_step <= 0 or head_step <= 0:
            return False
        if any(stride * size & 15 for stride in strides_of(x)):
            return False
    triton.set_allocator(_scratch)  # a context variable: backward runs in a thread that has not got it
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where a kernel keeps its descriptors; as stream-ordered as every allocation of PyTorch's."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def fitted(block: int, listed: int) -> int:
    """``block``, halved until it divides ``listed``, the size of a mask's block (0: no mask)."""
    while listed and listed % block:
        block //= 2
    return block


# ---------------------------------------------------------------------------------------------


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    form: Form,
    how: How,
    want_stats: bool,
    options: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, stats); ``stats`` as `empty_stats`, None unless asked for."""
    out = empty_heads(q, form.head_v)  # laid out as the caller's q, which a compiler's fake knows
    q, k, v = with_plain_rows(q), with_plain_rows(k), with_plain_rows(v)
    stats = empty_stats(q, form.additive) if want_stats else None
    if out.numel() == 0 or k.numel() == 0 or form.q_len == 0:
        if stats is not None:
            stats.fill_(float("inf"))
        return out.zero_(), stats
    block_d, block_v = max(16, power_of_two(form.head)), max(16, power_of_two(form.head_v))
    all_heads = form.batch * form.heads
    group = form.heads // form.key_heads
    section = section_of(group, form.k_len, (form.head + form.head_v) * q.element_size(), all_heads)
    chosen = options is not None
    if options is None:
        sizes = max(block_d, block_v), kind_of(form, how)
        options = forward_options(q.device.index, q.element_size(), *sizes)
    descriptors = described(options, q, k, v)
    if descriptors and not chosen and attention_hopper.takes(q, k, v, sinks, form, how):
        attention_hopper.run(q, k, v, out, stats, form, how, section)
        return out, stats
    lists = form.lists
    sparse_m, sparse_n = (0, 0) if lists is None else lists.size
    block_m, block_n = fitted(options["BLOCK_M"], sparse_m), fitted(options["BLOCK_N"], sparse_n)
    blocks = ceil_div(form.q_len, block_m)
    mask = form.mask
    _forward(
        (blocks * all_heads, 1, 1),
        (
            *(q, k, v, mask, sinks, form.starts_q, form.starts_k),
            *(None if lists is None else lists.kept, None if lists is None else lists.counts, out, stats),
            *(form.heads, all_heads, blocks, section),
            *(form.q_len, form.k_len, *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out)),
            *mask_strides(mask),
            *((0, 0, 0) if stats is None else stats_strides(stats)),
            *((0, 0, 0) if lists is None else (*lists.strides, lists.kept.shape[-1])),
            *(window_of(form, how), how.scale * LOG2E, how.softcap or 0.0),
        ),
        (
            *(form.head, form.head_v, block_d, block_v, group),
            *(how.causal or how.window is not None, how.window is not None, how.softcap is not None),
            *(mask is not None and mask.stride(2) != 0, sparse_m, sparse_n, block_m, block_n),
            *(bool(options["SPLIT"]), descriptors),
        ),
        options["num_warps"],
        options["num_stages"],
    )
    return out, stats
