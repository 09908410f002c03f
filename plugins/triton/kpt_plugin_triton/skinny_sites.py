"""Where products with few rows are worth a kernel of ours, and weights that are quantised once for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kpt_plugin_triton.sites import on_gpu
from kpt_plugin_triton.skinny import MOST_ROWS, linear_fp8, linear_int8, quantise_fp8, quantise_int8

if TYPE_CHECKING:
    from kpt.ops.sites import Site
    from kpt.specs import HardwareProfile, Observation

#: The largest share of a call that is expected to go: what else a call does was not measured.
_MOST_SAVED = 0.9


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


def predict_quantised(observation: Observation, hardware: HardwareProfile, sites: tuple[Site, ...]) -> float:
    """The gain of reading one byte for each weight: products of few rows take as long as their weights.

    From the measured bandwidth and the call's time. Where neither is known, the whole call counts as reading
    the model's parameters, as decoding a token does.
    """
    saved = sum(weight.numel() * (weight.element_size() - 1) for weight in _distinct_weights(sites))
    if hardware.bandwidth and observation.baseline_seconds:
        share = saved / hardware.bandwidth / observation.baseline_seconds
    else:
        share = saved / max(observation.parameter_bytes, saved, 1)
    return 1.0 / (1.0 - min(share, _MOST_SAVED))


def _distinct_weights(sites: tuple[Site, ...]) -> list[torch.Tensor]:
    """The weights of sites, those that several share once."""
    found = (site.weights().get("weight") for site in sites)
    return list({id(weight): weight for weight in found if isinstance(weight, torch.Tensor)}.values())


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
