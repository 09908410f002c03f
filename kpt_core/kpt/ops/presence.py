"""Which ops a captured graph could hold at all, told from one eager run: capturing costs seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kpt.ops import index

_ROOTS = ("rsqrt", "sqrt", "pow", "reciprocal")
_PRODUCTS = ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul")
#: For each op that `kpt.ops.regions` looks for, the torch operations of which one has to run.
_MARKS: dict[str, tuple[str, ...]] = {
    "add_rms_norm": ("rms_norm", "fused_rms_norm", *_ROOTS),
    "attention": ("scaled_dot_product", "softmax", "safe_softmax"),
    "cross_entropy": ("cross_entropy_loss", "log_softmax"),
    "gated_mlp": _PRODUCTS,
    "layer_norm": ("layer_norm", "native_layer_norm", *_ROOTS),
    "linear": _PRODUCTS,
    "rms_norm": ("rms_norm", "fused_rms_norm", *_ROOTS),
    "rope": ("neg",),
    "softmax": ("softmax", "safe_softmax", "exp"),
}


def marks(registry: Any = None) -> dict[str, tuple[str, ...]]:
    """The ops that can be found in a captured graph, each with the torch operations of which one has to run.

    Those of plugins are the ``marks`` of recognisers that look for regions themselves.
    """
    found = dict(_MARKS)
    for recogniser in index.recognisers(registry):
        if getattr(recogniser, "regions", None) is not None:
            for op, names in dict(getattr(recogniser, "marks", {})).items():
                found.setdefault(op, tuple(names))
    return found


class _Names(TorchDispatchMode):
    """Notes the names of the operations that run, without namespace, overload and underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2].strip("_")
        self.found.add("scaled_dot_product" if name.startswith("scaled_dot_product") else name)
        return func(*args, **(kwargs or {}))


def possible_ops(run: Callable[[], Any], registry: Any = None) -> frozenset[str]:
    """The ops that a graph of what ``run`` does could hold at most. It is called once, without gradients."""
    with torch.no_grad(), _Names() as names:
        run()
    return frozenset(op for op, few in marks(registry).items() if not names.found.isdisjoint(few))
