"""qk_norm_rope: rms_norm over each head of queries and keys, then the rotation, in one launch each way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl

from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor
from kpt_plugin_triton.kernels import qk_norm_rope as device
from kpt_plugin_triton.launch import Bound, Kernel, ceil_div, power_of_two, processors
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rope import DTYPES, WIDTHS, check_rotation, table_gradients, work_tensors
from kpt_plugin_triton.rotations import (
    Rotation,
    Shape,
    heads_each,
    is_token_major,
    like_heads,
    rest_block,
    rotation,
    side_by_side,
    tables,
    tile_candidates,
    tile_rule,
)
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuner import Workload
from kpt_plugin_triton.tuning import Options, Tuned, remembered

_forward = Kernel(device.qk_norm_rope_forward)
_backward = Kernel(device.qk_norm_rope_backward)
_weight_sums = Kernel(device.weight_sums)


def _block(width: int, turning: int) -> int:
    return max(power_of_two(turning // 2), rest_block(width, turning))


def _backward_rule(itemsize: int, width: int, turning: int) -> dict[str, int]:
    # Four pairs a thread: with the tables and the weight's sums, eight spill on sm_100, and four of the
    # widest heads, whose sums cross warps, on sm_90.
    block = _block(width, turning)
    pairs = 512 if block < 128 else 1024
    return {
        "TOKENS": max(1, min(32, pairs // block)),
        "HEADS": 4,
        "PROGRAMS": 6 if pairs == 512 else 3,
        "num_warps": 4,
    }


def _backward_candidates(itemsize: int, width: int, turning: int) -> Iterator[dict[str, int]]:
    block = _block(width, turning)
    for tokens in (2, 4, 8, 16, 32):
        for warps in (1, 2, 4, 8):
            if 4 <= tokens * block // (32 * warps) <= 8:
                for heads in (2, 4, 8):
                    for programs in (2, 3, 4, 5, 6, 8, 12):
                        if programs * warps <= 32:
                            yield {
                                "TOKENS": tokens,
                                "HEADS": heads,
                                "PROGRAMS": programs,
                                "num_warps": warps,
                            }


forward_options = Tuned("qk_norm_rope_forward", ("width", "turning"), tile_rule, tile_candidates)
backward_options = Tuned(
    "qk_norm_rope_backward", ("width", "turning"), _backward_rule, _backward_candidates, reach=1.0
)


def _plan(
    device: int | None,
    dtype: torch.dtype,
    interleaved: bool,
    q: tuple[Shape, Shape],
    k: tuple[Shape, Shape],
    table: tuple[Shape, Shape, Shape],
    options: Options | None = None,
) -> tuple[Rotation, Bound]:
    if options is None:
        options = forward_options(device, dtype.itemsize, q[0][3], table[0][2])
    how = rotation(device, dtype, options, q, k, table)
    constants = (*how.constants, interleaved, how.many, how.wide)
    return how, Bound(_forward, (how.programs, 1, 1), constants, options["num_warps"])


_remembered_plan = remembered(_plan)


def _run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.numel() + k.numel() == 0:
        return like_heads(q), like_heads(k)
    call = (
        *(q.device.index, q.dtype, interleaved),
        *((q.shape, q.stride()), (k.shape, k.stride()), (cos.shape, cos.stride(), sin.stride())),
    )
    how, bound = _remembered_plan(*call) if options is None else _plan(*call, options)
    results = how.results(q, k)
    q, k, cos, sin = how.readable(q, k, cos, sin)
    bound.start(q, k, q_weight, k_weight, cos, sin, *results, *how.numbers, eps, offset)
    return results


def _run_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
    options: Options | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dq_weight, dk_weight)."""
    dq, dk = like_heads(q), like_heads(k)
    dq_weight = None if q_weight is None else torch.empty_like(q_weight)
    dk_weight = None if k_weight is None else torch.empty_like(k_weight)
    q, k, dq_out, dk_out = side_by_side(q), side_by_side(k), side_by_side(dq_out), side_by_side(dk_out)
    batch, q_heads, sequence, width = q.shape
    k_heads, turning, tokens = k.shape[1], cos.shape[-1], batch * sequence
    if tokens == 0 or q_heads + k_heads == 0:
        for grad in (dq_weight, dk_weight):
            if grad is not None:
                grad.zero_()
        return dq, dk, dq_weight, dk_weight
    cos, sin, table_batch, table_token = tables(cos, sin)
    index, wide = q.device.index, wide_dtype(q.dtype)
    if options is None:
        options = backward_options(index, q.element_size(), width, turning)
    half, block = turning // 2, options["TOKENS"]
    blocks, most = ceil_div(tokens, block), options["PROGRAMS"] * processors(index)
    each = heads_each(options["HEADS"], blocks, q_heads, k_heads, 2 * most)
    # Programs in proportion to the heads, so that queries and keys end together.
    q_programs = min(blocks * ceil_div(q_heads, each), max(1, most * q_heads // (q_heads + k_heads)))
    k_programs = min(blocks * ceil_div(k_heads, each), max(1, most - q_programs))
    programs = q_programs + k_programs
    sums = torch.empty((programs, width), dtype=wide, device=q.device)
    accumulate = tl.float64 if wide is torch.float64 else tl.float32
    _backward(
        (programs, 1, 1),
        (
            *(q, k, dq_out, dk_out, q_weight, k_weight, cos, sin, dq, dk, sums, q_programs),
            *(tokens, sequence, q_heads, k_heads),
            *q.stride()[:3],
            *k.stride()[:3],
            *dq_out.stride()[:3],
            *dk_out.stride()[:3],
            *(table_batch, table_token, eps, offset),
        ),
        (
            *(width, half, power_of_two(half), rest_block(width, turning), each, block),
            *(is_token_major(dq), is_token_major(dk), interleaved, accumulate),
        ),
        options["num_warps"],
    )
    if dq_weight is not None or dk_weight is not None:
        _weight_sums(
            (2, ceil_div(width, 32), 1),
            (sums, dq_weight, dk_weight, q_programs, programs),
            (width, 32, 64, accumulate),
            8,
        )
    return dq, dk, dq_weight, dk_weight


def _of_tables(saved: tuple[torch.Tensor, ...], grads: Any, eps: float, offset: float, how: bool) -> Any:
    """Gradients of cos and sin, in plain PyTorch."""
    q, k, q_weight, k_weight, cos, sin = saved
    pairs = []
    for x, weight, grad in ((q, q_weight, grads[0]), (k, k_weight, grads[1])):
        x = x.to(wide_dtype(x.dtype))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        pairs.append((x if weight is None else x * (weight.to(x.dtype) + offset), grad))
    return table_gradients(tuple(pairs), cos, sin, how)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        how: tuple[float, float, bool],
    ) -> Any:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.how = how
        return _run_forward(q, k, q_weight, k_weight, cos, sin, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor) -> Any:
        saved, how = ctx.saved_tensors, ctx.how
        q, k, *rest = saved
        grads = _run_backward(q, k, dq_out, dk_out, *rest, *how)
        learned = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        by_tables = _of_tables(saved, (dq_out, dk_out), *how) if learned else (None, None)
        return *grads, *by_tables, None


_apply = applier(_QkNormRope)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, q_weight, k_weight, cos, sin)
    return _run_forward(q, k, _dense(q_weight), _dense(k_weight), cos, sin, eps, offset, interleaved)


def _op_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = _dense(q_weight), _dense(k_weight)
    dq, dk, *grads = _run_backward(q, k, dq_out, dk_out, *weights, cos, sin, eps, offset, interleaved)
    first, second = (q.new_empty(0) if grad is None else grad for grad in grads)
    return dq, dk, first, second


def _fake_backward(q: Any, k: Any, dq_out: Any, dk_out: Any, q_weight: Any, k_weight: Any, *_: Any) -> Any:
    grads = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return like_heads(q), like_heads(k), *grads


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, q_weight, k_weight, cos, sin, *how = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
    ctx.how = how


def _differentiate(ctx: Any, dq_out: torch.Tensor, dk_out: torch.Tensor) -> Any:
    saved, how = ctx.saved_tensors, ctx.how
    q, k, q_weight, k_weight, cos, sin = saved
    dq, dk, by_q, by_k = backward_op(q, k, dq_out, dk_out, q_weight, k_weight, cos, sin, *how)
    learned = cos.requires_grad or sin.requires_grad
    by_tables = _of_tables(saved, (dq_out, dk_out), *how) if learned else (None, None)
    weights = (None if q_weight is None else by_q), (None if k_weight is None else by_k)
    return dq, dk, *weights, *by_tables, None, None, None


backward_op = register(
    "qk_norm_rope_backward(Tensor q, Tensor k, Tensor dq_out, Tensor dk_out, Tensor? q_weight, "
    "Tensor? k_weight, Tensor cos, Tensor sin, float eps, float offset, bool interleaved) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
forward_op = register(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "float eps, float offset, bool interleaved) -> (Tensor, Tensor)",
    _op_forward,
    lambda q, k, *_: (like_heads(q), like_heads(k)),
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(q: Any, k: Any, q_weight: Any, k_weight: Any, cos: Any, sin: Any) -> None:
    check_rotation("qk_norm_rope", q, k, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor("qk_norm_rope", name, weight, DTYPES)
            check_shape("qk_norm_rope", name, weight, q.shape[-1:])
            check_same_device("qk_norm_rope", name, weight, q)


def _dense(weight: torch.Tensor | None) -> torch.Tensor | None:
    return weight if weight is None or weight.is_contiguous() else weight.contiguous()


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm over each head of ``q`` (B, H, S, D) and ``k`` (B, Hkv, S, D), then rope.

    ``q_weight`` and ``k_weight`` [D] or None, plus ``offset``, scale the features. ``cos`` and ``sin``
    (B or 1, S, R), pairs, dtypes, strides, results and errors as for `kpt_plugin_triton.rope.rope`;
    everything between reading and writing is fp32 (fp64 for fp64). Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape is not supported.
    """
    if torch.compiler.is_compiling():
        return forward_op(q, k, q_weight, k_weight, cos, sin, eps, offset, interleaved)  # type: ignore[no-any-return]
    _check(q, k, q_weight, k_weight, cos, sin)
    q_weight, k_weight = _dense(q_weight), _dense(k_weight)
    if needs_grad(q, k, q_weight, k_weight, cos, sin):
        return _apply(q, k, q_weight, k_weight, cos, sin, (eps, offset, interleaved))  # type: ignore[no-any-return]
    return _run_forward(q, k, q_weight, k_weight, cos, sin, eps, offset, interleaved)


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _work(dtype: torch.dtype, width: int, turning: int, backward: bool) -> Callable[..., Any]:
    q, k, cos, sin = work_tensors(dtype, width, turning)
    weight = torch.ones(width, dtype=dtype, device=q.device)
    if backward:
        return lambda options: (
            lambda: _run_backward(q, k, q, k, weight, weight, cos, sin, 1e-6, 0.0, False, options)
        )
    return lambda options: lambda: _run_forward(q, k, weight, weight, cos, sin, 1e-6, 0.0, False, options)


def _forward_work(dtype: torch.dtype, width: int, turning: int) -> Callable[[Options], Callable[[], Any]]:
    return _work(dtype, width, turning, False)


def _backward_work(dtype: torch.dtype, width: int, turning: int) -> Callable[[Options], Callable[[], Any]]:
    return _work(dtype, width, turning, True)


WORKLOADS = [
    Workload(forward_options, WIDTHS, _forward_work),
    Workload(backward_options, WIDTHS, _backward_work),
]
