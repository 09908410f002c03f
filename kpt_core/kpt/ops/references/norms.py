"""layer_norm, rms_norm and add_rms_norm.

References: layer normalisation, Ba et al. 2016, arXiv:1607.06450; root mean square layer
normalisation, Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.ops.binding import Hypothesis
from kpt.ops.hypotheses import attribute, epsilons, floats, only_tensor, own_parameters
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured

_LOW = (torch.float16, torch.bfloat16)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise ``x`` (..., D) over its last dimension to mean 0 and variance 1; scale and shift by (D,)."""
    wide = x.float() if x.dtype in _LOW else x
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(out.dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(x.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """Divide ``x`` (..., D) by its root mean square over its last dimension; scale by ``weight + offset``."""
    wide = x.float() if x.dtype in _LOW else x
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.to(out.dtype) + offset)
    return out.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``: what a pre-norm block does between two sublayers."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


class Norms:
    """Proposes layer_norm and rms_norm for a module with one tensor in and one of its shape out."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        output = captured.output
        if (
            found is None
            or getattr(output, "shape", None) != found[1].shape
            or not found[1].dtype.is_floating_point
        ):
            return
        x, seen = found
        vectors = own_parameters(module)
        if not vectors and not floats(module, 1e-16, 1e-2) and "eps" not in vars(module):
            return  # an activation, most likely
        if len(vectors) > 2 or any(value.dim() != 1 for value in vectors.values()) or not seen.shape:
            return
        for axis in _axes(seen.shape, vectors):
            last = axis == len(seen.shape) - 1
            given = x if last else f"{x}.movedim({axis}, -1)"
            result = "result" if last else f"result.movedim(-1, {axis})"
            for eps, value in epsilons(module, x):
                scales = (value**0.5, value)
                for arguments in _layer_norms(vectors):
                    yield Hypothesis(
                        "layer_norm", {"x": given, **arguments, "eps": eps}, result, scales=scales
                    )
                for arguments in _rms_norms(vectors):
                    yield Hypothesis("rms_norm", {"x": given, **arguments, "eps": eps}, result, scales=scales)


def _axes(shape: tuple[int, ...], vectors: dict[str, torch.Tensor]) -> Iterator[int]:
    sizes = {value.numel() for value in vectors.values()}
    last = len(shape) - 1
    if not sizes or sizes == {shape[last]}:
        yield last
    if len(shape) >= 3 and (not sizes or sizes == {shape[1]}) and last != 1:
        yield 1


def _layer_norms(vectors: dict[str, torch.Tensor]) -> Iterator[dict[str, str]]:
    names = list(vectors)
    if not names:
        yield {}
    elif len(names) == 1:
        yield {"weight": attribute(names[0])}
        yield {"bias": attribute(names[0])}
    else:
        first, second = sorted(names, key=lambda name: "bias" in name)
        yield {"weight": attribute(first), "bias": attribute(second)}
        yield {"weight": attribute(second), "bias": attribute(first)}


def _rms_norms(vectors: dict[str, torch.Tensor]) -> Iterator[dict[str, str]]:
    names = list(vectors)
    if not names:
        yield {}
    elif len(names) == 1:
        yield {"weight": attribute(names[0]), "offset": "0.0"}
        yield {"weight": attribute(names[0]), "offset": "1.0"}


class AddNorms:
    """Proposes add_rms_norm for a module with two tensors of one shape in and two out."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors = captured.tensors()
        output = captured.output
        if len(tensors) != 2 or type(output) is not tuple or len(output) != 2:
            return
        (x, one), (residual, other) = tensors.items()
        vectors = own_parameters(module)
        shapes = {one.shape, other.shape, *(getattr(item, "shape", None) for item in output)}
        if len(shapes) != 1 or len(vectors) > 1 or any(v.shape != one.shape[-1:] for v in vectors.values()):
            return
        for eps, value in epsilons(module, x):
            for arguments in _rms_norms(vectors):
                given = {"x": x, "residual": residual, **arguments, "eps": eps}
                for result in ("(result[0], result[1])", "(result[1], result[0])"):
                    yield Hypothesis("add_rms_norm", given, result, scales=(value**0.5, value))


_HOME = "kpt.ops.references.norms"
SPECS = (
    OpSpec(
        "layer_norm",
        "(x, weight=None, bias=None, eps=1e-5) -> y",
        f"{_HOME}:layer_norm",
        f"{_HOME}:Norms",
        "normalise the last dimension to mean 0 and variance 1",
    ),
    OpSpec(
        "rms_norm",
        "(x, weight=None, eps=1e-6, offset=0.0) -> y",
        f"{_HOME}:rms_norm",
        f"{_HOME}:Norms",
        "divide the last dimension by its root mean square; scale by weight + offset",
    ),
    OpSpec(
        "add_rms_norm",
        "(x, residual, weight=None, eps=1e-6, offset=0.0) -> (y, x + residual)",
        f"{_HOME}:add_rms_norm",
        f"{_HOME}:AddNorms",
        "add a residual and normalise the sum",
    ),
)
