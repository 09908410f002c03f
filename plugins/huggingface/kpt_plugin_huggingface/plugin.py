"""The hook of this plugin. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from kpt import hookimpl
from kpt.specs import AdapterSpec


@hookimpl
def kpt_model_adapters() -> Iterator[AdapterSpec]:
    yield AdapterSpec("huggingface", "kpt_plugin_huggingface.adapter:HuggingFace", "transformers")
