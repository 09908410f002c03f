"""Ops for `torch.library`: what torch.compile, torch.export and autograd see of a kernel.

Called eagerly, a kernel is started directly (the dispatcher costs several microseconds); while a graph is
traced, the same code is reached through ``torch.ops.kpt_triton``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "kpt_triton"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Any:
    """Define ``kpt_triton::<schema>`` and return the callable op.

    Args:
        run: the implementation, for every device that kernels run on.
        fake: gives outputs of the right shapes, dtypes and strides without computing.
        backward, setup_context: as `torch.library.register_autograd` takes them.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def needs_grad(*values: object) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if not torch.is_grad_enabled():
        return False
    for value in values:  # written out: a generator takes three times as long
        if isinstance(value, torch.Tensor) and value.requires_grad:
            return True
    return False


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what only transforms of functions (vmap, grad of ``torch.func``) need.

    That is Python in front of the C++ entry, and takes longer than it.
    """
    entry = super(torch.autograd.Function, function).apply
    transformed = torch._C._are_functorch_transforms_active

    def apply(*arguments: Any) -> Any:
        return function.apply(*arguments) if transformed() else entry(*arguments)

    return apply


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, without its cost where nobody asks for a second derivative.

    It enters `torch.no_grad` on each call, also where gradients are not recorded anyway: 3 µs on the way to a
    short kernel.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        return guarded(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return call
