"""The inputs of a typical call, from a model's configuration and the signature of its forward.

Guesses are tried in this order: what the library calls the model's main input, by its modality, with and
without a text to decode; then with the inputs of another modality that its forward takes; then the library's
own dummy inputs. The first call that runs is returned. Values are drawn with a fixed seed; ids and positions
are inside their tables, since an index outside of one ends a process on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

BATCH, TOKENS, DECODED = 1, 128, 16
IMAGE = 224
#: One second at the 16 kHz that speech models are trained on, and ten seconds of ten-millisecond frames.
SAMPLES, FRAMES = 16_000, 1_000
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")
#: Tokens that stand for an image or a sound, which then has to be there.
_MARKERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
_PIXELS, _WAVES, _FEATURES = "pixel_values", "input_values", "input_features"


def example_inputs(model: Any) -> dict[str, torch.Tensor] | None:
    """Keyword arguments that ``model`` runs with, on its device and in its dtype; None if no guess runs.

    The model's mode, its buffers and torch's random state are left as they were.
    """
    draw = Draw(model)
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for inputs in draw.guesses():
                if _runs(model, inputs):
                    return inputs
    finally:
        for module, training in modes.items():
            module.training = training
    return None


def _runs(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    try:
        model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - a guess that the model does not take; the next one is tried
        return False
    return True


class Draw:
    """Draws the inputs of one model. ``text`` is the part of the configuration that is about tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.text = model.config.get_text_config()
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(0)

    def guesses(self) -> Iterator[dict[str, torch.Tensor]]:
        """Calls worth a try, the most typical one first; only inputs that the forward takes."""
        main = self.model.main_input_name
        if main == _PIXELS:
            kinds = [self.pixels(), self.clip()]
        elif main == _WAVES:
            kinds = [self.wave(), self.mel(), self.channels()]
        elif main == _FEATURES:
            kinds = [self.features(), self.patches(), self.mel()]
        else:
            kinds = [self.tokens()]
        for inputs in kinds:
            if "decoder_input_ids" in self.parameters:
                yield self.known({**inputs, **self.decoder()})
            yield self.known(inputs)
        if main == "input_ids":
            for more in (self.pixels(), self.features(), self.patches(), self.wave()):
                if set(more) & set(self.parameters):
                    yield self.known({**self.tokens(), **more})
        dummy = getattr(self.model, "dummy_inputs", None)
        if dummy:
            yield self.known({name: value.to(self.model.device) for name, value in dummy.items()})

    def known(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in inputs.items() if name in self.parameters}

    # -- text

    def tokens(self) -> dict[str, torch.Tensor]:
        """``input_ids`` [1, S] and what a tokenizer returns with them; S is 128 or the most there may be."""
        length = min(TOKENS, self.longest())
        ids = self.ids(length)
        ends = self.special(self.text, "eos_token_id")
        if ends and self.config.is_encoder_decoder:
            ids[:, -1] = ends[0]  # heads of encoder-decoders read the state where the text ends
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if (getattr(self.text, "type_vocab_size", None) or 0) > 1:
            found["token_type_ids"] = torch.zeros_like(ids)
        return found

    def decoder(self) -> dict[str, torch.Tensor]:
        """``decoder_input_ids`` [1, 16], beginning as generation does."""
        ids = self.ids(min(DECODED, self.longest()))
        starts = self.special(self.config, "decoder_start_token_id")
        if starts:
            ids[:, 0] = starts[0]
        return {"decoder_input_ids": ids}

    def ids(self, length: int) -> torch.Tensor:
        """Token ids [1, length], none of them special."""
        special = {token for name in _SPECIAL for token in self.special(self.text, name)}
        special |= {token for name in _MARKERS for token in self.special(self.config, name)}
        allowed = torch.tensor([token for token in range(self.vocabulary()) if token not in special] or [0])
        drawn = torch.randint(0, len(allowed), (BATCH, length), generator=self.generator)
        return allowed[drawn].to(self.model.device)

    def special(self, config: Any, name: str) -> list[int]:
        """The ids of the vocabulary that ``config`` has under ``name``: one, several or none."""
        value = getattr(config, name, None)
        values = value if isinstance(value, (list, tuple)) else [value]
        return [token for token in values if isinstance(token, int) and 0 <= token < self.vocabulary()]

    def vocabulary(self) -> int:
        size = getattr(self.text, "vocab_size", None)
        if isinstance(size, int):
            return size
        table = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        return table if isinstance(table, int) else 2

    def longest(self) -> int:
        """How many tokens fit; RoBERTa and its kin count positions from 2."""
        most = getattr(self.text, "max_position_embeddings", None)
        return max(1, most - 2) if isinstance(most, int) and most > 0 else TOKENS

    # -- images and sound

    def pixels(self) -> dict[str, torch.Tensor]:
        """``pixel_values`` [1, C, H, W], normalised as processors do."""
        height, width = self.image()
        return {_PIXELS: self.normal(self.setting("num_channels", 3), height, width)}

    def clip(self) -> dict[str, torch.Tensor]:
        """``pixel_values`` of a video [1, T, C, H, W]."""
        frames = self.setting("num_frames", 16)
        return {_PIXELS: self.normal(frames, self.setting("num_channels", 3), *self.image())}

    def wave(self) -> dict[str, torch.Tensor]:
        """``input_values`` [1, 16000]: a second of sound."""
        return {_WAVES: self.normal(SAMPLES)}

    def channels(self) -> dict[str, torch.Tensor]:
        """``input_values`` [1, C, 16000], as codecs take it."""
        return {_WAVES: self.normal(self.setting("audio_channels", 1), SAMPLES)}

    def mel(self) -> dict[str, torch.Tensor]:
        """A spectrogram, time before frequency [1, T, F], under both of its names."""
        bins = self.setting("num_mel_bins", self.setting("input_feat_per_channel", self.width()))
        found = self.normal(self.setting("max_length", FRAMES, least=64), bins)
        return {_WAVES: found, _FEATURES: found}

    def features(self) -> dict[str, torch.Tensor]:
        """``input_features`` [1, F, T], frequency before time, as long as the positions of the encoder."""
        steps = 2 * self.setting("max_source_positions", FRAMES // 2)
        return {_FEATURES: self.normal(self.setting("num_mel_bins", 80), steps)}

    def patches(self) -> dict[str, torch.Tensor]:
        """``input_features`` [1, 1, T, F]: a spectrogram as an image of one channel."""
        return {_FEATURES: self.normal(1, FRAMES + 1, self.setting("num_mel_bins", 64))}

    def width(self) -> int:
        return self.setting("feature_projection_input_dim", 80)

    def image(self) -> tuple[int, int]:
        for config in self.parts():
            size = getattr(config, "image_size", None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, (list, tuple)) and len(size) == 2:
                return int(size[0]), int(size[1])
        return IMAGE, IMAGE

    def setting(self, name: str, default: int, least: int = 1) -> int:
        """The first whole number called ``name`` in the configuration or in its vision or audio part."""
        for config in self.parts():
            value = getattr(config, name, None)
            if isinstance(value, int) and value >= least:
                return value
        return default

    def parts(self) -> Iterator[Any]:
        yield self.config
        for name in ("vision_config", "audio_config", "encoder", "backbone_config"):
            part = getattr(self.config, name, None)
            if part is not None:
                yield part

    def normal(self, *shape: int) -> torch.Tensor:
        """Random values [1, *shape] with mean zero and variance one."""
        found = torch.randn(BATCH, *shape, generator=self.generator)
        return found.to(self.model.device, self.model.dtype)
