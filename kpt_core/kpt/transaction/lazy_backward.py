"""Gradients through a forward that was optimised for inference.

A model in evaluation mode that is called with gradients on returns outputs that may be
differentiated. The optimised forward knows no derivative, so the backward runs the original forward
again with gradients on and differentiates that, as activation checkpointing does. Nobody who never
calls ``backward`` pays for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from kpt.judge import tree


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fast: Any,
        slow: Any,
        structure: list[Any],
        inputs: Any,
        detached: frozenset[str],
        *sources: torch.Tensor,
    ) -> Any:
        ctx.slow = slow
        ctx.inputs = [(tensor, tensor._version) for tensor in inputs if not tensor.is_inference()]
        ctx.autocast = _autocast_state()
        ctx.save_for_backward(*sources)
        output = _unviewed(fast(), (*sources, *inputs), detached)
        structure.append(output)
        mine = {id(source) for source in sources}
        named = [(path, leaf) for path, leaf in tree.walk(output) if isinstance(leaf, torch.Tensor)]
        tensors = tuple(leaf.view_as(leaf) if id(leaf) in mine else leaf for _, leaf in named)
        ctx.mark_non_differentiable(
            *(
                tensor
                for (path, _), tensor in zip(named, tensors)
                if not _differentiable(tensor) or tree.spell(path) in detached
            )
        )
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        sources = ctx.saved_tensors
        if any(tensor._version != version for tensor, version in ctx.inputs):
            raise RuntimeError(
                "one of the inputs needed for the gradient was modified in place since the forward; "
                "clone it before writing to it"
            )
        second_order = torch.is_grad_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for device, enabled, dtype in ctx.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            outputs = [t for _, t in tree.walk(ctx.slow()) if isinstance(t, torch.Tensor)]
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o.requires_grad]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[5:]) if needed]
        results: list[torch.Tensor | None] = [None] * len(sources)
        if pairs and wanted:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [sources[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=second_order,
            )
            for index, gradient in zip(wanted, found):
                results[index] = gradient
        return (None, None, None, None, None, *results)


def _unviewed(output: Any, given: Sequence[torch.Tensor], detached: frozenset[str]) -> Any:
    """``output``, in which views of memory that nobody else sees are no views any more.

    Autograd refuses to write in place to a view that a function of one's own returns, while eager's output
    may well be written to (``logits[:, 0] = 0``). What is ``detached``, and views of other outputs or of what
    was ``given``, stay views: of these each write has to be known.
    """
    found = {id(leaf): (path, leaf) for path, leaf in tree.walk(output) if isinstance(leaf, torch.Tensor)}
    if not any(tensor._is_view() for _, tensor in found.values()):
        return output
    known = {_memory(tensor) for tensor in given}
    seen = Counter(_memory(tensor) for _, tensor in found.values())
    own = {
        key: tensor.data
        for key, (path, tensor) in found.items()
        if tensor._is_view()
        and _differentiable(tensor)
        and tree.spell(path) not in detached
        and seen[_memory(tensor)] == 1
        and _memory(tensor) not in known
    }
    return tree.rebuild(output, lambda path, leaf: own.get(id(leaf), leaf))


def _memory(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage; that of the tensor where it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _autocast_state() -> list[tuple[str, bool, torch.dtype]]:
    from kpt.transaction.ambient import autocast_devices

    return [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in autocast_devices()]


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def with_backward(
    fast: Callable[[], Any],
    slow: Callable[[], Any],
    sources: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor] = (),
    *,
    detached: frozenset[str] = frozenset(),
) -> Any:
    """``fast()``'s result, differentiable with respect to ``sources`` through ``slow()``.

    ``sources`` are the parameters and inputs that require a gradient; ``slow`` must use those very
    tensors and return the same structure. ``inputs`` are all tensors of the call: the backward needs
    them as they are now. ``detached`` names the outputs that carry no gradient in ``slow()`` either.

    Raises (in the backward):
        RuntimeError: an input was written to meanwhile, as autograd itself says it.
    """
    structure: list[Any] = []
    tensors = iter(_Recompute.apply(fast, slow, structure, tuple(inputs), detached, *sources))
    given = {id(source) for source in sources}

    def returned(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        computed = next(tensors)
        return leaf if id(leaf) in given else computed  # a parameter that is an output stays that parameter

    return tree.rebuild(structure.pop(), returned)
