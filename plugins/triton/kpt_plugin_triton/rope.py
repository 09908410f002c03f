"""rope: rotary position embedding of queries and keys in one launch, with gradients.

Reference: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import rope as device
from kpt_plugin_triton.launch import Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned

DTYPES = (*FLOATS, torch.float64)
#: Rows of a tile, however few there are: less would leave threads without a pair.
_FEWEST_ROWS = 8

_rope = Kernel(device.rope)


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


def may_be_whole(width: int, turning: int) -> bool:
    """Whether rows can be read in one piece, partners half a row apart."""
    return width == turning and width == power_of_two(width)


def _candidates(itemsize: int, width: int, turning: int) -> Iterator[dict[str, int]]:
    for options in tile_candidates(itemsize, width, turning):
        yield options
        if may_be_whole(width, turning):
            yield {**options, "WHOLE": 1}


options_of = Tuned("rope", ("width", "turning"), tile_rule, _candidates)


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
    even = [
        tokens % many == 0 and heads % across == 0 for (many, across), heads in ((q, q_heads), (k, k_heads))
    ]
    return Tiles(q, k, programs, (even[0], even[1]), tokens + rows >= 2**31)


def is_flat(x: torch.Tensor) -> bool:
    """Whether the tokens of all batch entries of ``x`` [B, H, S, D] are evenly spaced."""
    return bool(x.shape[0] == 1 or x.stride(0) == x.shape[2] * x.stride(2))


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotated q and k; with ``inverse`` multiplied by the transposed rotation."""
    q_out, k_out = like_heads(q), like_heads(k)
    q, k = side_by_side(q), side_by_side(k)
    batch, q_heads, sequence, width = q.shape
    k_heads, turning, tokens = k.shape[1], cos.shape[-1], batch * sequence
    if tokens == 0 or q_heads + k_heads == 0:
        return q_out, k_out
    cos, sin, table_batch, table_token = tables(cos, sin)
    index = q.device.index
    if options is None:
        options = options_of(index, q.element_size(), width, turning)
    whole = bool(options.get("WHOLE")) and not interleaved and may_be_whole(width, turning)
    half, majors = turning // 2, (is_token_major(q_out), is_token_major(k_out))
    tiles = tiles_of(options, tokens, q_heads, k_heads, majors, 8 * processors(index))
    _rope(
        (tiles.programs, 1, 1),
        (
            *(q, k, cos, sin, q_out, k_out, tokens, sequence),
            *q.stride()[:3],
            *k.stride()[:3],
            *(table_batch, table_token),
        ),
        (
            *(q_heads, k_heads, width, half, power_of_two(half), rest_block(width, turning)),
            *(*tiles.q, *tiles.k, is_flat(q), is_flat(k), *tiles.even),
            *(*majors, interleaved, inverse, whole, tiles.many),
            tl.float64 if wide_dtype(q.dtype) is torch.float64 else tl.float32,
        ),
        options["num_warps"],
    )
    return q_out, k_out


def _members(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def table_gradients(
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of cos and sin from (what was rotated, the gradient of what came out) of q and of k.

    In plain PyTorch: tables are rarely learned.
    """
    wide, turning = wide_dtype(cos.dtype), cos.shape[-1]
    by_cos = torch.zeros((), dtype=wide, device=cos.device)
    by_sin = torch.zeros((), dtype=wide, device=cos.device)
    for x, grad in pairs:
        x, grad = x[..., :turning].to(wide), grad[..., :turning].to(wide)
        first, second = _members(x, interleaved)
        if interleaved:
            turned = torch.stack((-second, first), dim=-1).flatten(-2)
        else:
            turned = torch.cat((-second, first), dim=-1)
        by_cos = by_cos + (x * grad).sum(1)
        by_sin = by_sin + (turned * grad).sum(1)
    return by_cos.sum_to_size(cos.shape).to(cos.dtype), by_sin.sum_to_size(sin.shape).to(sin.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> Any:
        learned = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(cos, sin, *((q, k) if learned else ()))
        ctx.interleaved = interleaved
        return _run(q, k, cos, sin, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin, *rotated = ctx.saved_tensors
        dcos = dsin = None
        if rotated:
            dcos, dsin = table_gradients(tuple(zip(rotated, (dq, dk))), cos, sin, ctx.interleaved)
        return *_run(dq, dk, cos, sin, ctx.interleaved, True), dcos, dsin, None


_apply = applier(_Rope)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    check_rotation("rope", q, k, cos, sin)
    return _run(q, k, cos, sin, interleaved, inverse)


def _fake(q: Any, k: Any, cos: Any, sin: Any, interleaved: bool, inverse: bool) -> Any:
    return like_heads(q), like_heads(k)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, cos, sin, interleaved, inverse = inputs
    learned = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, *((q, k) if learned else ()))
    ctx.interleaved, ctx.inverse = interleaved, inverse


def _differentiate(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
    cos, sin, *rotated = ctx.saved_tensors
    if ctx.inverse:
        raise NotImplementedError("rope is differentiable once; call backward without create_graph")
    dcos = dsin = None
    if rotated:
        dcos, dsin = table_gradients(tuple(zip(rotated, (dq, dk))), cos, sin, ctx.interleaved)
    return *rope_op(dq, dk, cos, sin, ctx.interleaved, True), dcos, dsin, None, None


rope_op = register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    _op,
    _fake,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def check_rotation(op: str, q: Any, k: Any, cos: Any, sin: Any) -> None:
    """The arguments that all rotations share; raises `KernelInputError`."""
    for name, value in (("q", q), ("k", k)):
        check_tensor(op, name, value, DTYPES)
        if value.dim() != 4:
            refuse(op, name, f"of shape {tuple(value.shape)}", "shape (B, H, S, D)")
    batch, _, sequence, width = q.shape
    check_tensor(op, "k", k, (q.dtype,))
    check_shape(op, "k", k, (batch, k.shape[1], sequence, width))
    check_same_device(op, "k", k, q)
    for name, value in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, value, DTYPES)
        check_same_device(op, name, value, q)
        fits = value.dim() == 3 and value.shape[0] in (1, batch) and value.shape[1] == sequence
        if not fits or value.shape[2] > width or value.shape[2] % 2 or value.shape[2] == 0:
            refuse(
                op,
                name,
                f"of shape {tuple(value.shape)}",
                f"shape (1 or {batch}, {sequence}, R) with an even R from 2 to {width}",
            )
    check_shape(op, "sin", sin, cos.shape)
    check_tensor(op, "sin", sin, (cos.dtype,))


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q`` (B, H, S, D) and ``k`` (B, Hkv, S, D) rotated by ``cos`` and ``sin`` (B or 1, S, R), R <= D.

    Pairs are (i, i + R/2), or (2i, 2i + 1) if ``interleaved``; features past R are copied. bf16, fp16, fp32
    or fp64, ``cos`` and ``sin`` of a dtype of their own; computed in fp32 (fp64). Any strides between
    heads, tokens and batch entries; features that are not side by side are copied first. Results have
    heads inside tokens, or tokens inside heads, as the arguments do. Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    if torch.compiler.is_compiling():
        return rope_op(q, k, cos, sin, interleaved, False)  # type: ignore[no-any-return]
    check_rotation("rope", q, k, cos, sin)
    if needs_grad(q, k, cos, sin):
        return _apply(q, k, cos, sin, interleaved)  # type: ignore[no-any-return]
    return _run(q, k, cos, sin, interleaved, False)


# ---------------------------------------------------------------------------------------------
# What tuning measures


def work_tensors(dtype: torch.dtype, width: int, turning: int) -> tuple[torch.Tensor, ...]:
    """q, k, cos and sin of 32 and 8 heads, as projections leave them."""
    where = work_device()
    tokens = max(64, min(32768, 2**27 // (40 * width * dtype.itemsize)))
    q = torch.randn(1, tokens, 32, width, dtype=dtype, device=where).transpose(1, 2)
    k = torch.randn(1, tokens, 8, width, dtype=dtype, device=where).transpose(1, 2)
    cos, sin = (torch.randn(1, tokens, turning, dtype=dtype, device=where) for _ in range(2))
    return q, k, cos, sin


def _work(dtype: torch.dtype, width: int, turning: int) -> Callable[[Options], Callable[[], Any]]:
    q, k, cos, sin = work_tensors(dtype, width, turning)
    return lambda options: lambda: _run(q, k, cos, sin, False, False, options)


#: Head sizes, and how much of a head turns, of common models.
WIDTHS = ((64, 64), (80, 32), (96, 96), (128, 64), (128, 128), (256, 256))
WORKLOADS = [Workload(options_of, WIDTHS, _work)]
