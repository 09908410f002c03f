"""fp32 linears by oneDNN with packed weights.

torch sends fp32 products to MKL, which is slow on CPUs of other vendors; oneDNN also keeps the
weight in the layout of its inner loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kpt_plugin_cpu import estimates

if TYPE_CHECKING:
    from kpt.ops.sites import Site
    from kpt.specs import HardwareProfile, Observation

#: What is expected where this machine's rates are not measured, since it was busy: worth a trial.
_UNMEASURED = 1.05


def supports(site: Site) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if "cpu" not in site.devices and site.devices:
        return f"the site is on {', '.join(site.devices)}"
    weight = site.weights().get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return "the weight is no module's own matrix"
    if weight.dtype is not torch.float32:
        return f"the weight is {weight.dtype}; float32 is packed"
    return None


def predict(observation: Observation, hardware: HardwareProfile, sites: tuple[Site, ...]) -> float:
    """The gain of the model's products at the rate measured for oneDNN instead of that of eager's library."""
    if not hardware.matmul_rates.get(estimates.ONEDNN) or not hardware.matmul_rates.get("float32"):
        return _UNMEASURED
    faster = estimates.rate_ratio(hardware, estimates.ONEDNN)
    return estimates.estimate(observation, hardware).gain(rate_ratio=faster)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [N, K] in oneDNN's layout, an opaque tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)  # type: ignore[no-any-return]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]; fp32."""
    bias = bias.contiguous() if bias is not None else None  # oneDNN reads it without its strides
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def prepare(site: Site) -> Callable[..., Any]:
    """Pack the site's weight once and return the kernel that uses it."""
    packed = pack(site.weights()["weight"])

    def packed_linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return linear(x, packed, bias)

    return packed_linear
