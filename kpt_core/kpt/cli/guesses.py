"""Example inputs for a model that nobody gave any for: drawn for the first layer, and tried."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

from kpt.plugins.isolation import attempt

#: Sizes of images (height and width) and lengths of signals, in the order in which they are tried.
_SIZES = {1: (16000, 1024, 128), 2: (224, 32, 28, 64), 3: (32, 16)}


def guessed_inputs(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """One call that ``model`` runs on, by keyword; None where its inputs cannot be guessed.

    Only for a forward with one required argument: its tensor has the form that the first layer with
    weights takes. The random state is left as it was.
    """
    required = [
        parameter
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) != 1 or required[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        return None
    first = next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if first is None:
        return None
    weight = next(first.parameters(recurse=False))
    for tensor in _candidates(first, weight.dtype):
        inputs = {required[0].name: tensor.to(weight.device)}
        with torch.random.fork_rng(), torch.no_grad():
            if attempt(model, **inputs).error is None:
                return inputs
    return None


def _candidates(layer: nn.Module, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if isinstance(layer, nn.Linear):
        yield floats(1, layer.in_features)
        yield floats(1, 16, layer.in_features)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        dimensions = len(layer.kernel_size)
        for size in _SIZES[dimensions]:
            yield floats(1, layer.in_channels, *[size] * dimensions)
    elif isinstance(layer, nn.Embedding):
        for length in (128, 16):
            yield torch.randint(0, layer.num_embeddings, (1, length), generator=generator)
