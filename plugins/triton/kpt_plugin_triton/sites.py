"""Which sites of a model the kernels take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kpt.ops.sites import Site


def on_gpu(site: Site) -> str | None:
    """The reason why a site cannot use a Triton kernel, or None."""
    if site.devices and not any(device.startswith("cuda") for device in site.devices):
        return f"the site is on {', '.join(site.devices)}; Triton kernels need a GPU"
    return None


def seen(site: Site, argument: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """The shapes and dtype names with which the examples of ``site`` passed an argument of its op as it is.

    Examples know the names of the forward's own parameters: ``query``, or ``x`` in a captured graph.
    """
    name = site.binding.arguments.get(argument, "")
    for example in site.examples:
        if name in example.shapes:
            yield example.shapes[name], example.dtypes[name]
