"""What rope and qk_norm_rope share: how heads lie in memory, and how a call is parted into programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kpt_plugin_triton.launch import ceil_div, power_of_two, processors
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuning import Options

#: Rows of a tile, however few there are: less would leave threads without a pair.
_FEWEST_ROWS = 8


def rest_block(width: int, turning: int) -> int:
    """The block of features that do not turn; 0 if all do."""
    return power_of_two(width - turning) if width > turning else 0


def tile_rule(itemsize: int, width: int, turning: int) -> dict[str, int]:
    """Heads of one token, side by side in memory as projections leave them; at most 16 pairs a thread."""
    block = max(power_of_two(turning // 2), rest_block(width, turning))
    pairs = 2048 if itemsize <= 4 else 1024
    heads = max(1, min(32, pairs // block))
    return {"TOKENS": max(1, min(16, pairs // 2 // (block * heads))), "HEADS": heads, "num_warps": 4}


def tile_candidates(itemsize: int, width: int, turning: int) -> Iterator[dict[str, int]]:
    block = max(power_of_two(turning // 2), rest_block(width, turning))
    for heads in (4, 8, 16, 32):
        for tokens in (1, 2, 4, 8):
            for warps in (1, 2, 4, 8):
                if 4 <= tokens * heads * block // (32 * warps) <= 16:
                    yield {"TOKENS": tokens, "HEADS": heads, "num_warps": warps}


def is_token_major(x: torch.Tensor) -> bool:
    """Whether ``x`` [B, H, S, D] has its heads inside its tokens in memory, as a projection leaves them."""
    return bool(x.stride(1) < x.stride(2))


def like_heads(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised dense [B, H, S, D] tensor, tokens and heads in the order in which ``x`` has them."""
    batch, heads, sequence, width = x.shape
    if is_token_major(x):
        return x.new_empty((batch, sequence, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, sequence, width))


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last dimension contiguous: itself wherever possible."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """(cos, sin, elements from one batch entry to the next, from one token to the next)."""
    if cos.stride() != sin.stride() or cos.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (0 if cos.shape[0] == 1 else cos.stride(0)), cos.stride(1)


def heads_each(most: int, blocks: int, q_heads: int, k_heads: int, wanted: int) -> int:
    """Heads of one program: as many as ``most``, as long as there are ``wanted`` programs."""
    each = most
    while each > 1 and blocks * (ceil_div(q_heads, each) + ceil_div(k_heads, each)) < wanted:
        each //= 2
    return each


class Tiles(NamedTuple):
    """How the rows of a call, one for each head of each token, are parted into programs."""

    q: tuple[int, int]
    k: tuple[int, int]
    programs: int
    #: Whether tiles of q, and of k, end where their tokens and heads do.
    even: tuple[bool, bool]
    many: bool


def tiles_of(
    options: Options, tokens: int, q_heads: int, k_heads: int, token_major: tuple[bool, bool], wanted: int
) -> Tiles:
    """(tokens, heads) of a program's tile of q and of k: as large as asked for while there are ``wanted``.

    With tokens inside heads in memory, a tile has more tokens and fewer heads.
    """
    rows = options["TOKENS"] * options["HEADS"]
    while rows > _FEWEST_ROWS and ceil_div(tokens * (q_heads + k_heads), rows) < wanted:
        rows //= 2

    def tile(heads: int, inside: bool) -> tuple[int, int]:
        across = min(rows, power_of_two(max(heads, 1)), options["HEADS"] if inside else 4)
        return rows // across, across

    q, k = tile(q_heads, token_major[0]), tile(k_heads, token_major[1])
    programs = sum(
        ceil_div(tokens, many) * ceil_div(heads, across)
        for (many, across), heads in ((q, q_heads), (k, k_heads))
    )
    # By sixteens, of which Triton compiles for multiples anew in any case: lengths alone cause no more of it.
    even = [
        (many == 1 or tokens % max(many, 16) == 0) and heads % across == 0
        for (many, across), heads in ((q, q_heads), (k, k_heads))
    ]
    return Tiles(q, k, programs, (even[0], even[1]), tokens + rows >= 2**31)


Shape = tuple[int, ...]


class Rotation(NamedTuple):
    """What a call needs beside its tensors.

    ``q_out`` and ``k_out`` are strides of the results; ``copied``: whether q, k and the tables are first.
    ``numbers`` and ``constants`` are a kernel's first arguments after the tensors, and its first constants.
    """

    q_out: Shape
    k_out: Shape
    copied: tuple[bool, bool, bool]
    programs: int
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]
    many: bool
    wide: Any

    def results(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised tensors for the rotated q and k."""
        return q.new_empty_strided(q.shape, self.q_out), k.new_empty_strided(k.shape, self.k_out)

    def readable(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments as the kernels read them: themselves wherever possible."""
        if self.copied[0]:
            q = q.contiguous()
        if self.copied[1]:
            k = k.contiguous()
        if self.copied[2]:
            cos, sin = cos.contiguous(), sin.contiguous()
        return q, k, cos, sin


def rotation(
    device: int | None,
    dtype: torch.dtype,
    options: Options,
    q: tuple[Shape, Shape],
    k: tuple[Shape, Shape],
    table: tuple[Shape, Shape, Shape],
) -> Rotation:
    """The `Rotation` of q and k, (shape, strides) each, by a table: its shape, strides of cos and of sin."""
    (batch, q_heads, sequence, width), k_heads, turning = q[0], k[0][1], table[0][2]
    tokens = batch * sequence
    majors = q[1][1] < q[1][2], k[1][1] < k[1][2]
    outs = [_heads_strides(shape, major) for (shape, _), major in zip((q, k), majors)]
    copied = [strides[3] != 1 and width != 1 for _, strides in (q, k)]
    dense = _heads_strides(q[0], False), _heads_strides(k[0], False)
    read = [new if copy else strides for (_, strides), new, copy in zip((q, k), dense, copied)]
    copy_table = table[1] != table[2] or table[1][2] != 1
    by_batch, by_token = (sequence * turning, turning) if copy_table else table[1][:2]
    tiles = tiles_of(options, tokens, q_heads, k_heads, majors, 8 * processors(device))
    flat = [batch == 1 or strides[0] == sequence * strides[2] for strides in read]
    half = turning // 2
    return Rotation(
        q_out=outs[0],
        k_out=outs[1],
        copied=(copied[0], copied[1], copy_table),
        programs=tiles.programs,
        numbers=(
            *(tokens, sequence, *read[0][:3], *read[1][:3]),
            *(0 if table[0][0] == 1 else by_batch, by_token),
        ),
        constants=(
            *(q_heads, k_heads, width, half, power_of_two(half), rest_block(width, turning)),
            *(*tiles.q, *tiles.k, *flat, *tiles.even, *majors),
        ),
        many=tiles.many,
        wide=tl.float64 if wide_dtype(dtype) is torch.float64 else tl.float32,
    )


def _heads_strides(shape: Shape, token_major: bool) -> Shape:
    heads, sequence, width = (max(size, 1) for size in shape[1:])
    if token_major:
        return heads * sequence * width, width, heads * width, 1
    return heads * sequence * width, sequence * width, width, 1
