"""Gradients through a forward that was optimised for inference.

A model in evaluation mode that is called with gradients on returns outputs that may be
differentiated. The optimised forward knows no derivative, so the backward runs the original forward
again with gradients on and differentiates that, as activation checkpointing does. Nobody who never
calls ``backward`` pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fast: Any, slow: Any, structure: list[Any], *sources: torch.Tensor) -> Any:
        ctx.slow = slow
        ctx.save_for_backward(*sources)
        leaves, spec = pytree.tree_flatten(fast())
        structure.append((spec, [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        inputs = {id(source) for source in sources}
        tensors = tuple(t.view_as(t) if id(t) in inputs else t for t in tensors)
        ctx.mark_non_differentiable(*(t for t in tensors if not _differentiable(t)))
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        sources = ctx.saved_tensors
        with torch.enable_grad():
            outputs = [t for t in pytree.tree_leaves(ctx.slow()) if isinstance(t, torch.Tensor)]
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        results: list[torch.Tensor | None] = [None] * len(sources)
        if pairs and wanted:
            found = torch.autograd.grad(
                [o for o, _ in pairs], [sources[i] for i in wanted], [g for _, g in pairs], allow_unused=True
            )
            for index, gradient in zip(wanted, found):
                results[index] = gradient
        return (None, None, None, *results)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def with_backward(fast: Callable[[], Any], slow: Callable[[], Any], sources: Sequence[torch.Tensor]) -> Any:
    """``fast()``'s result, differentiable with respect to ``sources`` through ``slow()``.

    ``sources`` are the parameters and inputs that require a gradient; ``slow`` must use those very
    tensors and return the same structure.
    """
    structure: list[Any] = []
    tensors = iter(_Recompute.apply(fast, slow, structure, *sources))
    spec, constants = structure.pop()
    leaves = [next(tensors) if boxed is None else boxed[0] for boxed in constants]
    return pytree.tree_unflatten(leaves, spec)
