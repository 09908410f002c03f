"""A model's classes and configuration in an artifact, and the empty model that they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kpt.specs import AdapterError
from kpt_plugin_huggingface.library import class_called, transformers

CONFIG = "config.json"
GENERATION = "generation_config.json"
#: Implementations of attention that need no other package; any other is left to the library's choice.
_ATTENTION = ("eager", "sdpa")


def describe(model: Any, folder: str) -> dict[str, Any] | None:
    """The names of the classes of ``model``; its configuration is written into ``folder``.

    None where `build` would make another model: a class of the user's own, a quantised model (its
    modules were exchanged after it was built), a structure that was changed after it was built.
    """
    config: Any = getattr(model, "config", None)
    names = type(model).__name__, type(config).__name__
    if class_called(names[0], "PreTrainedModel") is not type(model):
        return None
    if class_called(names[1], "PreTrainedConfig") is not type(config):
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None
    facts = {"class": names[0], "config": names[1], "attention": _attention(config)}
    files = Path(folder) / CONFIG, Path(folder) / GENERATION
    same = False
    try:
        # Written in full: what the library's next version takes for a default does not matter then.
        config.to_json_file(str(files[0]), use_diff=False)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.to_json_file(str(files[1]), use_diff=True)
        same = _structure(model) == _structure(_empty(facts, folder))
    finally:
        if not same:
            for file in files:
                file.unlink(missing_ok=True)
    return facts if same else None


def build(description: Mapping[str, Any], folder: str) -> Any:
    """The model with the library's own random weights, in float32.

    Raises `AdapterError` where this version of transformers has no such model.
    """
    library = transformers()
    model_class = class_called(description.get("class"), "PreTrainedModel")
    config_class = class_called(description.get("config"), "PreTrainedConfig")
    if model_class is None or config_class is None:
        raise AdapterError(
            "not-buildable",
            f"transformers {library.__version__} has no model {description.get('class')} "
            f"with the configuration {description.get('config')}.",
            "Install the version named in recipe.json.",
        )
    config = config_class.from_json_file(str(Path(folder) / CONFIG))
    # For each part by itself, and no other name than these: one with a slash would be code on the hub.
    chosen = description.get("attention") or {}
    config._attn_implementation = {
        part: chosen.get(part) if chosen.get(part) in _ATTENTION else None
        for part in ("", *config.sub_configs)
    }
    model = model_class(config)
    if (Path(folder) / GENERATION).is_file():
        model.generation_config = library.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _attention(config: Any) -> dict[str, str]:
    """The implementation of attention of the model ("") and of each part with a configuration."""
    parts = {"": config, **{part: getattr(config, part, None) for part in config.sub_configs}}
    found = {part: getattr(inner, "_attn_implementation", None) for part, inner in parts.items()}
    return {part: name for part, name in found.items() if name in _ATTENTION}


def _empty(facts: Mapping[str, Any], folder: str) -> Any:
    """The model again; without memory for its weights, where its constructor reads none of its tensors."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(facts, folder)
        except (NotImplementedError, RuntimeError):
            return build(facts, folder)


def _structure(model: Any) -> list[tuple[Any, ...]]:
    tensors = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    # By name: a parametrised module is of a class that was made for it alone.
    kinds = [(name, type(module).__module__, type(module).__name__) for name, module in model.named_modules()]
    return tensors + kinds
