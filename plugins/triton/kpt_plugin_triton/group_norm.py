"""group_norm, with an optional silu after it, and gradients.

Reference: Wu and He 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from typing import Any

import torch

from kpt_plugin_triton.activations import DTYPES
from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor, refuse
from kpt_plugin_triton.group_norm_launches import evenly_laid, run_backward, run_forward
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register
from kpt_plugin_triton.rows import wide_dtype


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        how: tuple[int, float, bool],
    ) -> torch.Tensor:
        groups, eps, silu = how
        y, mean, rstd = run_forward(x, groups, weight, bias, eps, silu, True)
        ctx.save_for_backward(x, weight, bias)
        ctx.held = mean, rstd, groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        mean, rstd, groups, silu = ctx.held
        wants = ctx.needs_input_grad
        grads = run_backward(x, dy, groups, weight, bias, mean, rstd, silu, wants[1], wants[2])
        return *grads, None


_apply = applier(_GroupNorm)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, groups, weight, bias, "silu" if silu else None)
    y, mean, rstd = run_forward(x, groups, _dense(weight), _dense(bias), eps, silu, True)
    return y, mean, rstd  # type: ignore[return-value]


def _fake_forward(x: Any, weight: Any, bias: Any, groups: int, eps: float, silu: bool) -> Any:
    statistics = (x.new_empty(x.shape[0] * groups, dtype=wide_dtype(x.dtype)) for _ in range(2))
    return torch.empty_like(evenly_laid(x)), *statistics


def _op_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    groups: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = run_backward(
        x, dy, groups, _dense(weight), _dense(bias), mean, rstd, silu, True, True
    )
    return dx, x.new_empty(0) if dweight is None else dweight, x.new_empty(0) if dbias is None else dbias


def _fake_backward(x: Any, dy: Any, weight: Any, bias: Any, *_: Any) -> Any:
    grads = (x.new_empty(0) if value is None else value.new_empty(value.shape) for value in (weight, bias))
    return torch.empty_like(evenly_laid(x)), *grads


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, groups, _, silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.groups, ctx.silu = groups, silu


def _differentiate(ctx: Any, dy: torch.Tensor, *_: Any) -> Any:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = backward_op(x, dy, weight, bias, mean, rstd, ctx.groups, ctx.silu)
    weights = (None if weight is None else dweight), (None if bias is None else dbias)
    return dx, *weights, None, None, None


backward_op = register(
    "group_norm_backward(Tensor x, Tensor dy, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "int groups, bool silu) -> (Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)
forward_op = register(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool silu) "
    "-> (Tensor, Tensor, Tensor)",
    _op_forward,
    _fake_forward,
    _differentiate,
    _remember,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check(x: Any, groups: Any, weight: Any, bias: Any, activation: Any) -> None:
    check_tensor("group_norm", "x", x, DTYPES, 2)
    channels = x.shape[1]
    if type(groups) is not int or groups < 1 or channels % groups or channels == 0:
        refuse("group_norm", "groups", f"{groups!r} for {channels} channels", "a divisor of the channels")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor("group_norm", name, vector, DTYPES)
            check_shape("group_norm", name, vector, (channels,))
            check_same_device("group_norm", name, vector, x)
    if activation not in (None, "silu"):
        refuse("group_norm", "activation", repr(activation), "None, silu")


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> torch.Tensor:
    """``x`` [N, C, ...] normalised over each group of channels, times ``weight`` [C], plus ``bias`` [C].

    ``activation`` None or silu follows in the same pass. bf16, fp16, fp32 or fp64; statistics in fp32 (fp64
    for fp64). Contiguous or channels last, and so is the result; other strides are copied first. A group
    that does not fit in the registers of one program is read twice. Differentiable once.

    Raises:
        KernelInputError: an argument's device, dtype or shape, groups or activation is not supported.
    """
    if torch.compiler.is_compiling():
        return forward_op(x, weight, bias, groups, eps, activation == "silu")[0]  # type: ignore[no-any-return]
    _check(x, groups, weight, bias, activation)
    weight, bias = _dense(weight), _dense(bias)
    silu = activation == "silu"
    if needs_grad(x, weight, bias):
        return _apply(x, weight, bias, (groups, eps, silu))  # type: ignore[no-any-return]
    return run_forward(x, groups, weight, bias, eps, silu, False)[0]
