"""What the tests of kernels do with arguments, results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def lacking(kernel: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """The names among ``given`` that an op of `torch.library` has no argument for: a RuntimeError, there."""
    overload = getattr(kernel, "_opoverload", None) or getattr(kernel, "default", kernel)
    schema = getattr(overload, "_schema", None)
    return sorted(set(given) - {each.name for each in schema.arguments}) if schema is not None else []


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` in ``dtype`` if it is a floating-point tensor; codes of 8 bits are packed, and stay."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1
    return value.to(dtype) if floating else value


def requiring_grad(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, floating-point tensors as leaves that require gradients; codes of 8 bits cannot."""
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.itemsize > 1
        else value
        for name, value in given.items()
    }


def gradients(
    run: Callable[..., Any], arguments: Mapping[str, Any], upstream: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    given = requiring_grad(arguments)
    return backward(given, tensors(run(**given)), upstream)


def backward(
    given: Mapping[str, Any], results: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of the leaves among ``given`` by name, those that there are."""
    leaves = {name: v for name, v in given.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    pairs = [
        (out, grad.to(out.dtype)) for out, grad in zip(results, upstream, strict=True) if out.requires_grad
    ]
    if not leaves or not pairs:
        return {}
    outs, grads = zip(*pairs)
    found = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found) if grad is not None}


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list)) else []


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
