"""Convolutions with channels innermost, the layout that oneDNN computes in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant, replace_forward
from kpt_plugin_cpu import nested
from kpt_plugin_cpu.estimates import matmul_seconds


class ChannelsLast:
    """Converts 4-d inputs at the root and convolution weights in the workspace.

    Outputs keep the layout that eager gives them: it computes in the layout of inputs and weights, so
    where none of these has channels innermost, outputs that have it, flattened ones too, are made contiguous.
    """

    def __init__(self) -> None:
        self.weights = 0
        self.calls = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in observation.model.modules())
        images = any(len(leaf.shape) == 4 and leaf.role == "float" for leaf in observation.spec.leaves)
        if not convolutions or not images:
            yield Skip("the model takes no images" if convolutions else "the model has no 2-d convolution")
            return
        share = matmul_seconds(observation, hardware, "float32") / max(observation.baseline_seconds, 1e-9)
        yield Variant("convolutions", {}, 1.0 + 0.3 * share, sites=("",), derives=True)

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        innermost = False
        replaced: list[tuple[torch.nn.Module, Any]] = []
        for module in model.modules():
            if not isinstance(module, torch.nn.Conv2d):
                continue
            before = module._parameters.get("weight")  # else it is computed, by a hook or a parametrisation
            if before is not None and before.dim() == 4:
                innermost = innermost or _innermost(before)
                replaced.append((module, before))
                weight = before.detach().contiguous(memory_format=torch.channels_last)
                module._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
                self.weights += 1
        inner = model.forward

        def convert(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor) and leaf.dim() == 4:
                return leaf.contiguous(memory_format=torch.channels_last)
            return leaf

        def converted(value: Any) -> Any:
            # Other holders stay the caller's own: a model may write to them.
            return pytree.tree_map(convert, value) if type(value) in (list, tuple) else convert(value)

        def restore(tensor: torch.Tensor) -> torch.Tensor | None:
            plain = tensor.layout is torch.strided and not tensor.is_nested
            turned = plain and tensor.dim() > 2 and tensor.stride(1) == 1
            return tensor.contiguous() if turned and not tensor.is_contiguous() else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.calls += 1
            stays = innermost or any(map(_innermost, pytree.tree_leaves((args, kwargs))))
            named = {name: converted(value) for name, value in kwargs.items()}
            output = inner(*map(converted, args), **named)
            if stays:
                return output
            return pytree.tree_map(lambda leaf: nested.changed(leaf, restore), output)

        put_back = replace_forward(model, forward)

        def undo() -> None:
            put_back()
            for module, weight in replaced:
                module._parameters["weight"] = weight

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.weights > 0


def _innermost(value: Any) -> bool:
    """Whether ``value`` is a 4-d tensor with channels innermost, and not contiguous as it is."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and not value.is_contiguous()
    )
