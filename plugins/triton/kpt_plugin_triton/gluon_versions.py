"""Which releases of Triton have a Gluon that the kernels for one chip were compiled and run with.

Gluon is experimental: names within kernels are looked up when one is compiled, at its first call, which is
too late to do without it.
"""

from __future__ import annotations

import triton

_KNOWN = ("3.6", "3.7")


def known() -> bool:
    """Whether the installed Triton is one of them; the portable kernels serve all others."""
    return ".".join(triton.__version__.split(".")[:2]) in _KNOWN
