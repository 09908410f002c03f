"""attention with gradients: causal, grouped queries, window, masks, soft cap, sinks.

Reference: Dao 2023, arXiv:2307.08691; sinks: Xiao et al. 2023, arXiv:2309.17453.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kpt_plugin_triton import decode
from kpt_plugin_triton.attention_backward import keys_options, queries_options, run_backward
from kpt_plugin_triton.attention_checks import (
    LARGEST_HEAD,
    check_heads,
    check_mask,
    check_scale,
    check_window,
)
from kpt_plugin_triton.attention_forward import (
    CAUSAL,
    LISTED,
    PLAIN,
    WINDOWED,
    Form,
    How,
    empty_heads,
    empty_stats,
    form_of,
    forward_options,
    run_forward,
)
from kpt_plugin_triton.block_lists import lists_of
from kpt_plugin_triton.checks import FLOATS, dtype_name
from kpt_plugin_triton.registration import applier, needs_grad, register
from kpt_plugin_triton.tuner import Workload, work_device
from kpt_plugin_triton.tuning import Options

if TYPE_CHECKING:
    from kpt.ops.sites import Site


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    form: Form,
    how: How,
    want_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    run = decode.run_decode if decode.takes(form, how) else run_forward
    return run(q, k, v, sinks, form, how, want_stats)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        form: Form,
        how: How,
    ) -> torch.Tensor:
        out, stats = _run(q, k, v, sinks, form, how, True)
        ctx.save_for_backward(q, k, v, sinks, out)
        # neither inputs nor outputs, so that a plain attribute may hold them
        ctx.held = stats, form, how
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("attention is differentiable once; call backward without create_graph")
        q, k, v, sinks, out = ctx.saved_tensors
        stats, form, how = ctx.held
        wants = ctx.needs_input_grad
        parts = wants[0], wants[1] or wants[2]
        dq, dk, dv, dsinks = run_backward(dout, q, k, v, sinks, out, stats, form, how, parts)
        grads = (dq, dk, dv, dsinks)
        return *(grad if wanted else None for grad, wanted in zip(grads, wants)), None, None


_apply = applier(_Attention)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _form(q: Any, k: Any, v: Any, mask: Any, starts: Any, longest: Any, blocks: Any, how: How) -> Form:
    starts_q, starts_k = starts
    lists = None if blocks is None else lists_of(blocks, q.shape[2], k.shape[2], how.causal, how.window)
    return form_of(q, k, v, mask, starts_q, starts_k, longest, lists)


def _op_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    block_mask: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    how = How(causal, window, scale, softcap)
    form = _form(q, k, v, mask, (starts_q, starts_k), (max_q, max_k), block_mask, how)
    return _run(q, k, v, sinks, form, how, True)  # type: ignore[return-value]


def _fake_forward(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    sinks: Any,
    starts_q: Any,
    starts_k: Any,
    max_q: Any,
    max_k: Any,
    block_mask: Any,
    causal: bool,
    window: Any,
    scale: float,
    softcap: Any,
) -> Any:
    additive = mask is not None and mask.dtype != torch.bool
    return empty_heads(q, v.shape[-1]), empty_stats(q, additive)


def _op_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    block_mask: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    how = How(causal, window, scale, softcap)
    form = _form(q, k, v, mask, (starts_q, starts_k), (max_q, max_k), block_mask, how)
    dq, dk, dv, dsinks = run_backward(dout, q, k, v, sinks, out, stats, form, how)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


def _fake_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, stats: Any, mask: Any, *rest: Any) -> Any:
    sinks = rest[0]
    grads = (empty_heads(x, x.shape[-1]) for x in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, sinks, starts_q, starts_k, max_q, max_k, block_mask, *how = inputs
    ctx.save_for_backward(q, k, v, *output, mask, sinks, starts_q, starts_k, block_mask)
    ctx.longest, ctx.how = (max_q, max_k), how


def _differentiate(ctx: Any, dout: Any, _: Any) -> Any:
    q, k, v, out, stats, mask, sinks, starts_q, starts_k, block_mask = ctx.saved_tensors
    dq, dk, dv, dsinks = backward_op(
        *(dout, q, k, v, out, stats, mask, sinks, starts_q, starts_k, *ctx.longest, block_mask, *ctx.how)
    )
    return dq, dk, dv, None, None if sinks is None else dsinks, *(None,) * 9


_ARGUMENTS = (
    "Tensor? mask, Tensor? sinks, Tensor? starts_q, Tensor? starts_k, SymInt max_q, SymInt max_k, "
    "Tensor? block_mask, bool causal, SymInt? window, float scale, float? softcap"
)
backward_op = register(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
forward_op = register(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# Entries


def call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    how: How,
    *,
    mask: torch.Tensor | None = None,
    starts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    longest: tuple[int, int] = (0, 0),
    block_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run what was checked: through the registered ops while a graph is traced, else directly."""
    sinks = None if sinks is None else sinks.contiguous()
    if torch.compiler.is_compiling():
        out, _ = forward_op(q, k, v, mask, sinks, *starts, *longest, block_mask, *how)
        return out  # type: ignore[no-any-return]
    form = _form(q, k, v, mask, starts, longest, block_mask, how)
    if needs_grad(q, k, v, sinks):
        return _apply(q, k, v, sinks, form, how)  # type: ignore[no-any-return]
    return _run(q, k, v, sinks, form, how, False)[0]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of ``q`` (B, H, S, D) over ``k`` (B, Hkv, L, D) and ``v`` (B, Hkv, L, Dv).

    Arguments as for the op's reference; see there. bf16, fp16 or fp32 (products in full fp32, no TF32), up
    to 256 features. A mask is read where it lies, whatever its broadcast strides. Up to 16 queries over
    many keys are split over the keys. Differentiable once in ``q``, ``k``, ``v`` and ``sinks``; sums are in
    a fixed order.

    Raises:
        KernelInputError: an argument's device, dtype, shape or value is not supported, or ``mask`` needs
            a gradient.
    """
    name = "attention"
    check_heads(name, q, k, v, 4)
    if mask is not None:
        check_mask(name, q, k, mask)
    check_window(name, window)
    how = How(is_causal, window, check_scale(name, q, scale, softcap, sinks), softcap)
    return call(q, k, v, sinks, how, mask=mask)


def supports(site: Site) -> str | None:
    """The reason why a site cannot use this kernel, or None; sizes are those that the site has seen."""
    from kpt_plugin_triton.sites import on_gpu, seen

    refusal = on_gpu(site)
    if refusal is not None:
        return refusal
    for name in ("q", "v"):
        for shape, _ in seen(site, name):
            if len(shape) == 4 and shape[-1] > LARGEST_HEAD:
                return f"{name} has {shape[-1]} features; supported are up to {LARGEST_HEAD}"
    for dtypes in zip(*([dtype for _, dtype in seen(site, name)] for name in ("q", "k", "v"))):
        if len(set(dtypes)) > 1:
            return f"q, k and v are in {', '.join(dtypes)}; supported is one dtype for all"
    for _, mask in seen(site, "mask"):
        if mask not in ("bool", *map(dtype_name, FLOATS)):
            return f"mask is {mask}; supported are bool, {', '.join(map(dtype_name, FLOATS))}"
    scale = site.weights().get("scale")
    if scale is not None and not scale > 0:
        return f"scale is {scale!r}; supported are positive numbers"
    return None


# ---------------------------------------------------------------------------------------------
# What tuning measures


def _inputs(dtype: torch.dtype, head: int, kind: int) -> tuple[tuple[torch.Tensor, ...], Form, How]:
    """4096 queries and keys; windows of 1024 keys; of blocks of 128 a quarter, drawn at random."""
    length = 4096
    shape = (1, 4096 // head, length, head)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=work_device()) for _ in range(4))
    how = How(kind == CAUSAL, 1024 if kind == WINDOWED else None, head**-0.5, None)
    lists = None
    if kind == LISTED:
        blocks = length // 128
        drawn = torch.rand(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.25
        lists = lists_of(drawn.to(work_device()), length, length, False, None)
    return (q, k, v, dout), form_of(q, k, v, lists=lists), how


def _forward_work(dtype: torch.dtype, head: int, kind: int) -> Callable[[Options], Callable[[], Any]]:
    (q, k, v, _), form, how = _inputs(dtype, head, kind)

    def with_options(options: Options) -> Callable[[], Any]:
        return lambda: run_forward(q, k, v, None, form, how, True, options)

    return with_options


def _backward_work(parts: tuple[bool, bool]) -> Callable[..., Callable[[Options], Callable[[], Any]]]:
    def prepare(dtype: torch.dtype, head: int, kind: int) -> Callable[[Options], Callable[[], Any]]:
        (q, k, v, dout), form, how = _inputs(dtype, head, kind)
        out, stats = torch.empty_like(q), empty_stats(q, False)
        if out.device.type != "meta":
            out, stats = run_forward(q, k, v, None, form, how, True)  # type: ignore[assignment]

        def with_options(options: Options) -> Callable[[], Any]:
            def call() -> tuple[torch.Tensor, ...]:
                dq, dk, dv, _ = run_backward(dout, q, k, v, None, out, stats, form, how, parts, options)
                return (dk, dv) if parts[1] else (dq,)

            return call

        return with_options

    return prepare


_SIZES = tuple((head, kind) for head in (64, 128) for kind in (CAUSAL, PLAIN, WINDOWED, LISTED))
WORKLOADS = [
    Workload(forward_options, _SIZES, _forward_work, (torch.bfloat16,)),
    Workload(keys_options, _SIZES, _backward_work((False, True)), (torch.bfloat16,)),
    Workload(queries_options, _SIZES, _backward_work((True, False)), (torch.bfloat16,)),
    *decode.WORKLOADS,
]
