"""A linear layer in int8 arithmetic: int8 weights per output channel, uint8 activations per row.

y[r, n] = sum_k x[r, k] w[n, k] + b[n], with x[r, :] ~ s[r] (u[r, :] - 128) and w[n, :] ~ t[n] q[n, :].
The integer product (VNNI or AMX, through oneDNN) yields sum_k (u - 128) q scaled by t; the row scales s
and the bias are applied to its output, where the compiler fuses them with what follows. Scales of
activations come from each row of each call, so no calibration is needed.

The activations are unsigned with a zero point because oneDNN multiplies u8 by s8 natively; signed
activations fall into a reference path that is slower by orders of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Rows of an activation are stored around this zero point.
ZERO_POINT = 128


@torch.library.custom_op("kpt_cpu::pack_int8", mutates_args=())
def pack_int8(weight: Tensor) -> Tensor:
    """Weights [N, K] int8 in oneDNN's own layout. Inductor folds it into a constant when it freezes."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


@pack_int8.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[1], weight.shape[0]))


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 weights, float32 scales [N]) of weights [N, K], symmetric per output channel."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """Replaces an `nn.Linear` in a workspace; holds copies derived from its weights.

    Inputs of any floating dtype and shape [..., K]; the output has the input's dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        quantized, scale = quantize_weight(linear.weight)
        self.quantized = quantized
        self.scale = scale
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.one = torch.ones(1)
        self.zero_point = torch.tensor([ZERO_POINT])
        self.weight_zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._packed: Tensor | None = None
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        wide = rows.float()
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (wide * (1 / scale) + ZERO_POINT).round().clamp(1, 255).to(torch.uint8)
        if torch.compiler.is_compiling():
            packed = torch.ops.kpt_cpu.pack_int8(self.quantized)
        else:
            if self._packed is None:
                self._packed = torch.ops.kpt_cpu.pack_int8(self.quantized)
            packed = self._packed
        product = torch.ops.onednn.qlinear_pointwise.tensor(
            codes,
            self.one,
            self.zero_point,
            packed,
            self.scale,
            self.weight_zero_points,
            None,
            1.0,
            0,
            x.dtype if x.dtype in (torch.float32, torch.bfloat16) else torch.float32,
            "none",
            [],
            "",
        )
        result = product.float() * scale
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
