"""One call of a kernel or its reference: what it returned or raised, its gradients, what it wrote to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kpt.judge import outputs, tree
from kpt.judge.calls import Call
from kpt.judge.kernel_inputs import tensors_of
from kpt.judge.verdict import Verdict, rejected


def attempted(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a kernel of any origin returned, or None and what it raised."""
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - whatever it raises is its verdict
        return None, f"{type(error).__name__}: {error}"


def backward(
    function: Callable[[Mapping[str, Any]], Any],
    inputs: Mapping[str, Any],
    wanted: list[str],
    upstream: list[torch.Tensor],
) -> tuple[dict[str, torch.Tensor | None], bool]:
    """Gradients by name, and whether no input's version counter moved."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    arguments = {**inputs, **leaves}
    versions = versions_of(arguments)
    with torch.enable_grad():
        result = function(arguments)
        pairs = [
            (tensor, grad.to(tensor.dtype))
            for tensor, grad in zip(outputs.tensors(result).values(), upstream, strict=True)
            if tensor.requires_grad
        ]
        grads: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if pairs:
            grads = torch.autograd.grad(
                [tensor for tensor, _ in pairs],
                list(leaves.values()),
                [grad for _, grad in pairs],
                allow_unused=True,
            )
    return dict(zip(wanted, grads, strict=True)), versions == versions_of(arguments)


def cloned(path: tree.Path, leaf: Any) -> Any:
    """A leaf of a kernel's outputs, as a copy if it is a tensor."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def versions_of(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Version counters by name; tensors made in inference mode have none."""
    return {name: t._version for name, t in tensors_of(inputs).items() if not t.is_inference()}


def modified(before: Call, after: Call, versions: Mapping[str, int]) -> Verdict | None:
    """A rejection if a call changed its inputs, or wrote to one of them; ``versions`` are those before it."""
    changed = outputs.identical(before.kwargs, after.kwargs)
    if changed is not None:
        return rejected("input-modified", f"the kernel changed its input {changed}")
    for name, version in versions_of(after.kwargs).items():
        if version != versions[name]:
            return rejected("input-modified", f"the kernel wrote to its input {name}")
    return None
