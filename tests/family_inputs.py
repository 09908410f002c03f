"""What models of the families of transformers are called with: functions of a generator of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BATCH, SEQUENCE, VOCABULARY = 2, 48, 512

Inputs = Callable[["torch.Generator"], "dict[str, torch.Tensor]"]


def _ids(generator: torch.Generator, batch: int, sequence: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Token ids [batch, sequence] that are never one of the first four, which serve as special tokens."""
    import torch

    return torch.randint(4, vocabulary, (batch, sequence), generator=generator)


def text(*, padded: bool = False, batch: int = BATCH, sequence: int = SEQUENCE) -> Inputs:
    """Ids and a mask [batch, sequence]; ``padded`` ends every row but the first early."""

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        ids = _ids(generator, batch, sequence)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(1, batch):
                mask[row, sequence - 7 * row :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return inputs


def ids_only(*, batch: int = BATCH, sequence: int = SEQUENCE) -> Inputs:
    return lambda generator: {"input_ids": _ids(generator, batch, sequence)}


def text_to_text(*, batch: int = BATCH, source: int = SEQUENCE, target: int = 16) -> Inputs:
    """Source ids and mask [batch, source], target ids [batch, target]."""

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            **text(batch=batch, sequence=source)(generator),
            "decoder_input_ids": _ids(generator, batch, target),
        }

    return inputs


def image(size: int = 64, *, batch: int = BATCH, channels: int = 3) -> Inputs:
    """Pixels [batch, channels, size, size] with mean zero and variance one."""

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"pixel_values": torch.randn(batch, channels, size, size, generator=generator)}

    return inputs


def image_and_text(size: int, sequence: int, *, batch: int = BATCH) -> Inputs:
    return lambda generator: {
        **text(batch=batch, sequence=sequence)(generator),
        **image(size, batch=batch)(generator),
    }


def waveform(samples: int = 4000, *, batch: int = BATCH) -> Inputs:
    """Audio [batch, samples]."""

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"input_values": torch.randn(batch, samples, generator=generator)}

    return inputs


def spectrogram(*shape: int, name: str = "input_features", batch: int = BATCH, target: int = 0) -> Inputs:
    """Features [batch, *shape] under ``name``; with ``target``, decoder ids [batch, target] as well."""

    def inputs(generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        features = {name: torch.randn(batch, *shape, generator=generator)}
        if target:
            features["decoder_input_ids"] = _ids(generator, batch, target)
        return features

    return inputs
