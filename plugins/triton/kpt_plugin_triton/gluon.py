"""Kernels for one chip in Gluon, where the installed Triton has a Gluon that they were compiled and run with.

Gluon is experimental: names within kernels are looked up when one is compiled, at its first call, which is
too late to do without it. Where there is no such Gluon the portable kernels serve.
"""

from __future__ import annotations

import functools
import importlib

import triton

from kpt_plugin_triton.launch import INTERPRETED, Kernel

_KNOWN = ("3.6", "3.7")


@functools.cache
def kernel(module: str, name: str) -> Kernel | None:
    """The function ``name`` of ``kpt_plugin_triton.kernels.<module>``; None where it can't be compiled."""
    if INTERPRETED or ".".join(triton.__version__.split(".")[:2]) not in _KNOWN:
        return None
    try:
        found = importlib.import_module(f"kpt_plugin_triton.kernels.{module}")
    except (ImportError, AttributeError):
        return None
    return Kernel(getattr(found, name))
