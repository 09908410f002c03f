"""The adapter: what transformers knows about its models, behind the protocol of the core."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class HuggingFace:
    """`kpt.specs.Adapter` for `transformers.PreTrainedModel`; transformers is imported when it is needed."""

    def matches(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` is a `PreTrainedModel`, which it can be only where transformers is imported."""
        library = sys.modules.get("transformers.modeling_utils")
        return library is not None and isinstance(model, library.PreTrainedModel)

    def example_inputs(self, model: torch.nn.Module) -> Mapping[str, Any] | None:
        """Keyword arguments of a typical call, which the model was run with once; None if no guess runs."""
        from kpt_plugin_huggingface.inputs import example_inputs

        return example_inputs(model)

    def blocks(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Paths of the layers that repeat, outermost first."""
        from kpt_plugin_huggingface.blocks import blocks

        return blocks(model)

    def executes(self, folder: str) -> tuple[str, ...]:
        """Code, pickles and hub kernels that loading ``folder`` would execute."""
        from kpt_plugin_huggingface.folders import executes

        return executes(folder)

    def load(self, folder: str, *, trust: bool) -> torch.nn.Module | None:
        """The model in ``folder`` with its weights, or None without a ``config.json`` of transformers."""
        from kpt_plugin_huggingface.folders import load

        return load(folder, trust=trust)

    def describe(self, model: torch.nn.Module, folder: str) -> Mapping[str, Any] | None:
        """The classes of ``model`` and its configuration, which is written into ``folder``."""
        from kpt_plugin_huggingface.rebuilding import describe

        return describe(model, folder)

    def build(self, description: Mapping[str, Any], folder: str) -> torch.nn.Module:
        """The model of that configuration, with random weights."""
        from kpt_plugin_huggingface.rebuilding import build

        return build(description, folder)
