"""Which sites of a model the kernels take."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt.ops.sites import Site


def on_gpu(site: Site) -> str | None:
    """The reason why a site cannot use a Triton kernel, or None."""
    if site.devices and not any(device.startswith("cuda") for device in site.devices):
        return f"the site is on {', '.join(site.devices)}; Triton kernels need a GPU"
    return None
