"""Where a model repeats itself."""

from __future__ import annotations

from typing import Any

import torch


def blocks(model: Any) -> tuple[str, ...]:
    """Paths of the layers that repeat, outermost first, in the order of the model.

    A layer counts if it stands in a list of modules and the library names its class as one that is not
    split between devices, or checkpoints it as a whole. Where it names none, layers are what stands in a
    list beside another of its class.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    whole = set(getattr(model, "_no_split_modules", None) or ())
    named = [
        path
        for path, layer in _listed(model)
        if type(layer).__name__ in whole or isinstance(layer, GradientCheckpointingLayer)
    ]
    found = named or [
        path
        for path, layer in _listed(model)
        if sum(type(other) is type(layer) for other in _siblings(model, path)) > 1
        and any(True for _ in layer.parameters())
    ]
    return tuple(sorted(found, key=lambda path: path.count(".")))


def _listed(model: Any) -> list[tuple[str, torch.nn.Module]]:
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    return [
        (f"{path}.{name}" if path else name, layer)
        for path, module in model.named_modules()
        if isinstance(module, lists)
        for name, layer in module.named_children()
    ]


def _siblings(model: Any, path: str) -> list[torch.nn.Module]:
    return list(model.get_submodule(path.rpartition(".")[0]).children())
