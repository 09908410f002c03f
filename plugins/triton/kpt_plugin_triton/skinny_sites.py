"""Where products with few rows are worth a kernel of ours, and weights that are quantised once for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kpt_plugin_triton.sites import on_gpu
from kpt_plugin_triton.skinny import MOST_ROWS, linear_fp8, linear_int8, quantise_fp8, quantise_int8

if TYPE_CHECKING:
    from kpt.ops.sites import Site


def supports(site: Site) -> str | None:
    """The reason why a site gains nothing here: not on a GPU, or never few rows."""
    refusal = on_gpu(site) or _too_many_rows(site)
    if refusal is not None:
        return refusal
    weight = site.weights().get("weight")
    if not isinstance(weight, torch.Tensor):
        return None
    if weight.dim() != 2 or weight.stride(1) != 1:
        return f"its weight is stored with strides {weight.stride()}; the kernel reads rows of [N, K]"
    return None


def _too_many_rows(site: Site) -> str | None:
    """A site may also see many rows, as a decoder does in its prefill: those calls go to PyTorch."""
    name = site.binding.arguments.get("x", "")
    counts = []
    for example in site.examples:
        shape = example.shapes.get(name)
        if shape is None and len(example.shapes) == 1:
            shape = next(iter(example.shapes.values()))
        if shape:
            rows = 1
            for size in shape[:-1]:
                rows *= size
            counts.append(rows)
    if counts and not any(0 < rows <= MOST_ROWS for rows in counts):
        return f"it was called with {min(counts)} rows or more; skinny products are for at most {MOST_ROWS}"
    return None


def supports_quantised(site: Site) -> str | None:
    """As `supports`, for a weight that will be quantised: it has to be the module's own matrix."""
    refusal = on_gpu(site) or _too_many_rows(site)
    if refusal is not None:
        return refusal
    weight = site.weights().get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return "the weight is no module's own matrix"
    return None


def prepare_int8(site: Site) -> Callable[..., torch.Tensor]:
    """Quantise the site's weight to int8 once and return the kernel that uses it."""
    packed, scale = quantise_int8(site.weights()["weight"])

    def int8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_int8(x, packed, scale, bias)

    return int8_linear


def prepare_fp8(site: Site) -> Callable[..., torch.Tensor]:
    """Quantise the site's weight to its GPU's fp8 once and return the kernel that uses it."""
    packed, scale = quantise_fp8(site.weights()["weight"])

    def fp8_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear_fp8(x, packed, scale, bias)

    return fp8_linear
