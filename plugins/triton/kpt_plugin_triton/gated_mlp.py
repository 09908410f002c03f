"""gated_mlp: products of torch's around `glu`, with gradients.

The hidden activation is not kept for the backward but computed again, in the launch that gives the gradients
of gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kpt_plugin_triton.activations import DTYPES, check_activation
from kpt_plugin_triton.checks import check_same_device, check_shape, check_tensor
from kpt_plugin_triton.glu import check, glu_op, run_backward, run_forward
from kpt_plugin_triton.registration import applier, needs_grad, once_differentiable, register


def _joined(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """The one tensor whose halves along axis 0 these are; None if they lie apart in memory."""
    if first is None or second is None:
        return None
    start = first.storage_offset()
    if second.storage_offset() != start + first.numel() or first.numel() == 0:
        return None
    if not (first.is_contiguous() and second.is_contiguous() and first.shape == second.shape):
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    return first.detach().as_strided((2 * first.shape[0], *first.shape[1:]), first.stride(), start)


def _fused(
    gate: torch.Tensor, up: torch.Tensor, gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool] | None:
    """(weight, bias, whether the gate comes first) of one product that gives both; None if there is none."""
    for first, second, biases, gate_first in (
        (gate, up, (gate_bias, up_bias), True),
        (up, gate, (up_bias, gate_bias), False),
    ):
        weight = _joined(first, second)
        if weight is not None:
            if gate_bias is None and up_bias is None:
                return weight, None, gate_first
            bias = _joined(*biases)
            if bias is not None:
                return weight, bias, gate_first
    return None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        gate, up = _gate_and_up(x, gate_weight, up_weight, gate_bias, up_bias)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        ctx.activation = activation
        return F.linear(run_forward(gate, up, activation), down_weight, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> Any:
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        inner = gate.shape[-1]
        x_rows, dout = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
        fused = _fused(gate_weight, up_weight, None, None)
        into, both = None, None
        if fused is not None:
            both = dout.new_empty((dout.shape[0], 2 * inner))
            first, second = both[:, :inner], both[:, inner:]
            into = (first, second) if fused[2] else (second, first)
        hidden, dgate, dup = run_backward(
            gate.reshape(-1, inner),
            up.reshape(-1, inner),
            dout @ down_weight,
            ctx.activation,
            into,
            wants[3],
        )
        dx = dgate_weight = dup_weight = None
        if fused is not None and both is not None:
            if wants[0]:
                dx = (both @ fused[0]).view(x.shape)
            if wants[1] or wants[2]:
                one, other = (both.t() @ x_rows).split(inner)
                dgate_weight, dup_weight = (one, other) if fused[2] else (other, one)
        else:
            if wants[0]:
                dx = (dgate @ gate_weight).addmm_(dup, up_weight).view(x.shape)
            dgate_weight = dgate.t() @ x_rows if wants[1] else None
            dup_weight = dup.t() @ x_rows if wants[2] else None
        return (
            dx,
            dgate_weight,
            dup_weight,
            dout.t() @ hidden if hidden is not None else None,
            dgate.sum(0) if wants[4] else None,
            dup.sum(0) if wants[5] else None,
            dout.sum(0) if wants[6] else None,
            None,
        )


_apply = applier(_GatedMLP)


def _gate_and_up(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fused = _fused(gate_weight, up_weight, gate_bias, up_bias)
    if fused is None:
        return F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
    weight, bias, gate_first = fused
    one, other = F.linear(x, weight, bias).chunk(2, dim=-1)
    return (one, other) if gate_first else (other, one)


# ---------------------------------------------------------------------------------------------
# What the compiler sees


def _op_backward_again(
    gate: torch.Tensor, up: torch.Tensor, dout: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return run_backward(gate, up, dout, activation, None, True)  # type: ignore[return-value]


def _op_glu_down(
    gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    check("gated_mlp", gate, up, activation)
    return F.linear(run_forward(gate, up, activation), weight, bias)


def _remember_down(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, weight, bias, ctx.activation = inputs
    ctx.save_for_backward(gate, up, weight)
    ctx.biased = bias is not None


def _differentiate_down(ctx: Any, dout: torch.Tensor) -> Any:
    gate, up, weight = ctx.saved_tensors
    hidden, dgate, dup = backward_again_op(gate, up, dout @ weight, ctx.activation)
    dout = dout.reshape(-1, dout.shape[-1])
    dweight = dout.t() @ hidden.reshape(-1, hidden.shape[-1])
    return dgate, dup, dweight, dout.sum(0) if ctx.biased else None, None


backward_again_op = register(
    "glu_backward_again(Tensor gate, Tensor up, Tensor dout, str activation) -> (Tensor, Tensor, Tensor)",
    _op_backward_again,
    lambda gate, up, dout, activation: tuple(gate.new_empty(gate.shape) for _ in range(3)),
)
glu_down_op = register(
    "glu_down(Tensor gate, Tensor up, Tensor weight, Tensor? bias, str activation) -> Tensor",
    _op_glu_down,
    lambda gate, up, weight, bias, activation: gate.new_empty((*gate.shape[:-1], weight.shape[0])),
    _differentiate_down,
    _remember_down,
)

# ---------------------------------------------------------------------------------------------
# The function that the kernel's spec names


def _check_mlp(x: Any, tensors: dict[str, Any], activation: Any) -> None:
    check_activation("gated_mlp", activation)
    check_tensor("gated_mlp", "x", x, DTYPES)
    hidden = x.shape[-1]
    check_tensor("gated_mlp", "gate_weight", tensors["gate_weight"], (x.dtype,), 2)
    check_tensor("gated_mlp", "down_weight", tensors["down_weight"], (x.dtype,), 2)
    inner, outer = tensors["gate_weight"].shape[0], tensors["down_weight"].shape[0]
    shapes = {
        "gate_weight": (inner, hidden),
        "up_weight": (inner, hidden),
        "down_weight": (outer, inner),
        "gate_bias": (inner,),
        "up_bias": (inner,),
        "down_bias": (outer,),
    }
    for name, value in tensors.items():
        if value is not None:
            check_tensor("gated_mlp", name, value, (x.dtype,))
            check_shape("gated_mlp", name, value, shapes[name])
            check_same_device("gated_mlp", name, value, x)


def _autocast(x: torch.Tensor, tensors: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """All of them in autocast's dtype where it is on, as F.linear would have them."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return x, tensors
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), {name: t if t is None else t.to(dtype) for name, t in tensors.items()}


def gated_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """``down(activation(gate(x)) * up(x))``: x (..., H), gate and up (I, H), down (H, I), each with a bias.

    The products are torch's; where gate and up lie beside each other in one tensor (its ``chunk(2)``), in
    either order, they are one product. ``activation`` and dtypes as for `glu`; all tensors are of one dtype.
    Differentiable once; what is kept for that is x, gate(x) and up(x).

    Raises:
        KernelInputError: an argument's device, dtype or shape, or the activation, is not supported.
    """
    tensors = {
        "gate_weight": gate_weight,
        "up_weight": up_weight,
        "down_weight": down_weight,
        "gate_bias": gate_bias,
        "up_bias": up_bias,
        "down_bias": down_bias,
    }
    x, tensors = _autocast(x, tensors)
    if torch.compiler.is_compiling():
        gate = F.linear(x, tensors["gate_weight"], tensors["gate_bias"])
        up = F.linear(x, tensors["up_weight"], tensors["up_bias"])
        if needs_grad(x, *tensors.values()):
            return glu_down_op(  # type: ignore[no-any-return]
                gate, up, tensors["down_weight"], tensors["down_bias"], activation
            )
        return F.linear(glu_op(gate, up, activation), tensors["down_weight"], tensors["down_bias"])
    _check_mlp(x, tensors, activation)
    if needs_grad(x, *tensors.values()):
        return _apply(x, *tensors.values(), activation)  # type: ignore[no-any-return]
    gate, up = _gate_and_up(
        x, tensors["gate_weight"], tensors["up_weight"], tensors["gate_bias"], tensors["up_bias"]
    )
    return F.linear(run_forward(gate, up, activation), tensors["down_weight"], tensors["down_bias"])
