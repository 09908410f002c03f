"""rope: rotary position embedding of queries and keys in one launch, with gradients.

Reference: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton.checks import FLOATS, check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.kernels import rope as device
from kpt_plugin_triton.launch import Bound, Kernel, power_of_two
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rotations import Rotation, Shape, like_heads, rotation, tile_candidates, tile_rule
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options, Tuned, remembered

DTYPES = (*FLOATS, torch.float64)
_rope = Kernel(device.rope)


def may_be_whole(width: int, turning: int) -> bool:
    """Whether rows can be read in one piece, partners half a row apart."""
    return width == turning and width == power_of_two(width)


def _candidates(itemsize: int, width: int, turning: int) -> Iterator[dict[str, int]]:
    for options in tile_candidates(itemsize, width, turning):
        yield options
        if may_be_whole(width, turning):
            yield {**options, "WHOLE": 1}


options_of = Tuned("rope", ("width", "turning"), tile_rule, _candidates)


def _plan(
    device: int | None,
    dtype: torch.dtype,
    interleaved: bool,
    inverse: bool,
    q: tuple[Shape, Shape],
    k: tuple[Shape, Shape],
    table: tuple[Shape, Shape, Shape],
    options: Options | None = None,
) -> tuple[Rotation, Bound]:
    width, turning = q[0][3], table[0][2]
    if options is None:
        options = options_of(device, dtype.itemsize, width, turning)
    whole = bool(options.get("WHOLE")) and not interleaved and may_be_whole(width, turning)
    how = rotation(device, dtype, options, q, k, table)
    constants = (*how.constants, interleaved, inverse, whole, how.many, how.wide)
    return how, Bound(_rope, (how.programs, 1, 1), constants, options["num_warps"])


_remembered_plan = remembered(_plan)


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
    if q.numel() + k.numel() == 0:
        return like_heads(q), like_heads(k)
    call = (
        *(q.device.index, q.dtype, interleaved, inverse),
        *((q.shape, q.stride()), (k.shape, k.stride()), (cos.shape, cos.stride(), sin.stride())),
    )
    how, bound = _remembered_plan(*call) if options is None else _plan(*call, options)
    results = how.results(q, k)
    bound.start(*how.readable(q, k, cos, sin), *results, *how.numbers)
    return results


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
