"""A linear layer in int8 arithmetic: int8 weights per output channel, uint8 activations per row.

y[r, n] = sum_k x[r, k] w[n, k] + b[n], with x[r, :] ~ s[r] (u[r, :] - 128) and w[n, :] ~ t[n] q[n, :].
The integer product (VNNI or AMX, through oneDNN) yields sum_k (u - 128) q scaled by t; the row scales s
and the bias are applied to its output, where the compiler fuses them with what follows. Scales of
activations come from each row of each call.

A few channels of an activation are often a hundred times larger than the others, which then are rounded
coarsely in their company. So each channel k may be divided by a factor f[k], which the weights are multiplied
by: f[k] = sqrt(max |x[:, k]| / max |w[:, k]|) makes both equally wide (Xiao et al., "SmoothQuant", 2023). The
maxima of x come from a few calls; another call is right with any factors, only less finely rounded.

The activations are unsigned with a zero point because oneDNN multiplies u8 by s8 natively; signed
activations fall into a reference path that is slower by orders of magnitude.

Without VNNI oneDNN adds two products in 16 bits, which saturate: 255 * 127 * 2 is too much, 255 * 63 * 2 is
not. So weights have seven bits where products are seen to saturate.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from kpt.compiling import is_fused
from kpt_plugin_cpu import native_int8

#: Rows of an activation are stored around this zero point.
ZERO_POINT = 128
#: Powers of two that a channel is divided by, at most: one that is tiny in the examples may not be in a call.
_MOST = 6


@torch.library.custom_op("kpt_cpu::pack_int8", mutates_args=())
def pack_int8(weight: Tensor) -> Tensor:
    """Weights [N, K] int8 in oneDNN's own layout. Inductor folds it into a constant when it freezes."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


@pack_int8.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[1], weight.shape[0]))


#: Where the packed form of int8 weights is put when a call first needs it, by the weights.
_places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _product(codes: Tensor, weight: Tensor, scale: Tensor, zero_points: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_k (codes[r, k] - 128) weight[n, k] scale[n] in ``dtype``; ``weight`` is packed once."""
    place: list[Tensor] = _places.get(weight, [])
    if not place:
        place.append(torch.ops.kpt_cpu.pack_int8(weight))
    return packed_product(codes, place[0], scale, zero_points, dtype)


def packed_product(
    codes: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor, dtype: torch.dtype
) -> Tensor:
    """sum_k (codes[r, k] - 128) w[n, k] scale[n] in ``dtype``, [R, N]; `pack_int8` packed the weights."""
    return torch.ops.onednn.qlinear_pointwise.tensor(  # type: ignore[no-any-return]
        codes, *_constants(), packed, scale, zero_points, None, 1.0, 0, dtype, "none", [], ""
    )


@functools.lru_cache(maxsize=1)
def _constants() -> tuple[Tensor, Tensor]:
    return torch.ones(1, dtype=torch.float32, device="cpu"), torch.tensor([ZERO_POINT], device="cpu")


# Not `torch.library.custom_op`: what that checks in Python takes longer than small products.
_library = torch.library.Library("kpt_cpu", "FRAGMENT")
_library.define(
    "int8_product(Tensor codes, Tensor weight, Tensor scale, Tensor zero_points, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("int8_product", _product, "CPU")


@torch.library.register_fake("kpt_cpu::int8_product", lib=_library)
def _(codes: Tensor, weight: Tensor, scale: Tensor, zero_points: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


@functools.lru_cache(maxsize=1)
def largest_weight() -> int:
    """The largest int8 weight that this process multiplies right: 127, or 63 where products saturate."""
    width = 64
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        codes = torch.full((1, width), 255, dtype=torch.uint8)
        weight = torch.full((width, width), 127, dtype=torch.int8)
        zero_points = torch.zeros(width, dtype=torch.int64)
        scale = torch.ones(width, dtype=torch.float32)
        product = _product(codes, weight, scale, zero_points, torch.float32)
    return 127 if bool((product == (255 - ZERO_POINT) * 127 * width).all()) else 63


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 weights, float32 scales [N]) of weights [N, K], symmetric per output channel.

    The largest of a channel becomes `largest_weight`. Rows lie one after the other, as packing takes them;
    those of a tied or transposed weight may not.
    """
    most = largest_weight()
    wide = weight.detach().float().contiguous()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * most) / most
    return (wide / scale[:, None]).round_().clamp_(-most, most).to(torch.int8), scale


def smoothing(weights: Tensor, inputs: Tensor) -> Tensor:
    """The factors f [K] float32 for the largest absolute ``weights`` and ``inputs`` of each channel, [K].

    A channel that is zero in either, or not finite, is left as it is. The factors are scaled so that their
    geometric mean is 1, and are powers of two from 1/64 to 64: dividing by them rounds nothing.
    """
    factors = (inputs.float() / weights.float()).sqrt()
    usable = torch.isfinite(factors) & (factors > 0.0)
    if not usable.any():
        return torch.ones_like(factors)
    exponents = torch.where(usable, factors, 1.0).log2()
    exponents = exponents - exponents[usable].mean()
    return torch.where(usable, exponents.round().clamp(-_MOST, _MOST), 0.0).exp2()


def joined(x: Tensor) -> Tensor:
    """``x``, or the rows of a nested one one after the other: encoders leave padding out by such tensors."""
    return torch.cat(x.unbind()) if x.is_nested else x


class Int8Linear(nn.Module):
    """Replaces an `nn.Linear` in a workspace; holds copies derived from its weights.

    Inputs of any floating dtype and shape [..., K]; the output has the input's dtype. The channels of
    the input are multiplied by ``inverse`` [K] first, and the weights are made to fit. ``native`` has rows
    rounded, and products scaled, by C++ of our own where no compiler does it.
    """

    def __init__(self, linear: nn.Linear, inverse: Tensor | None = None, *, native: bool = False) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that it is no child
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        self.inverse = inverse
        self.native = native
        if inverse is not None:
            weight = weight.float() / inverse
        quantized, scale = quantize_weight(weight)
        self.quantized = quantized
        self.scale = scale
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.one = torch.ones(1, dtype=torch.float32)
        self.zero_point = torch.tensor([ZERO_POINT])
        self.weight_zero_points = torch.zeros(self.out_features, dtype=torch.int64)
        self._packed: list[Tensor] = []
        _places[self.quantized] = self._packed
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that it stands for: some forwards ask for its dtype."""
        return self._linear[0].weight

    def forward(self, input: Tensor) -> Tensor:
        if input.is_nested:
            lengths = [len(part) for part in input.unbind()]
            parts = self(joined(input)).split(lengths)
            return torch.nested.as_nested_tensor(list(parts))
        x = input
        rows = x.reshape(-1, self.in_features)
        # A compiler makes one loop of what is written out, and of what comes before and after it.
        fused = is_fused()
        native = self.native and x.dtype in native_int8.DTYPES and not fused
        if native:
            codes, scale = native_int8.quantize_rows(rows, self.inverse)
        else:
            codes, scale = self._quantized_rows(rows)
        dtype = x.dtype if x.dtype in native_int8.DTYPES else torch.float32
        if fused:
            packed = torch.ops.kpt_cpu.pack_int8(self.quantized)
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
                dtype,
                "none",
                [],
                "",
            )
        else:
            product = torch.ops.kpt_cpu.int8_product(
                codes, self.quantized, self.scale, self.weight_zero_points, dtype
            )
        if native:
            result = native_int8.rescale_rows(product, scale, self.bias)
        else:
            result = product.float() * scale
            if self.bias is not None:
                result = result + self.bias
        return result.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _quantized_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `native_int8.quantize_rows`, in operations of torch; the scales are [R, 1]."""
        wide = rows.float() if self.inverse is None else rows.float() * self.inverse
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        codes = (wide * (1 / scale) + ZERO_POINT).round().clamp(1, 255).to(torch.uint8)
        return codes, scale
