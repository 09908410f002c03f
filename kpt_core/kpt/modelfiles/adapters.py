"""The model adapters that plugins bring, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kpt.plugins import instantiate
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line

if TYPE_CHECKING:
    import torch

    from kpt.modelfiles.base import Notice
    from kpt.plugins import Registered, Registry
    from kpt.specs import Adapter, AdapterSpec

#: The file that gives a folder away as one that a plugin of this project loads, and that plugin.
LAYOUTS = {"config.json": "huggingface"}


def adapters(registry: Registry, tell: Notice) -> Iterator[tuple[Registered[AdapterSpec], Adapter]]:
    """Every adapter that can be imported, with where it comes from; ``tell`` hears of the others."""
    for registered in registry.specs("kpt_model_adapters"):
        outcome = attempt(instantiate, registered.spec.entry)
        if outcome.error is not None:
            tell(f"{registered.owner} cannot be used: {one_line(outcome.error)}")
        elif outcome.value is not None:
            yield registered, outcome.value


def adapters_for(
    model: torch.nn.Module, registry: Registry, tell: Notice
) -> Iterator[tuple[Registered[AdapterSpec], Adapter]]:
    """The adapters that say that ``model`` is one of their library's."""
    for registered, adapter in adapters(registry, tell):
        outcome = attempt(adapter.matches, model)
        if outcome.error is not None:
            tell(f"{registered.owner} cannot tell what the model is: {one_line(outcome.error)}")
        elif not isinstance(outcome.value, bool):
            answer = type(outcome.value).__name__
            tell(f"{registered.owner} cannot tell what the model is: its matches returned {answer}, no bool")
        elif outcome.value:
            yield registered, adapter


def missing(name: str, registry: Registry) -> tuple[str, str]:
    """Why the plugin ``name`` of this project gives no adapter: the reason, and what mends it."""
    status = registry.status(name)
    if status is None or not status.distribution:
        return f"the plugin {name!r}, which is not installed", f"pip install kpt-plugin-{name}"
    return f"the plugin {name!r}, which is {status.state}: {status.reason}", status.mend


def layout_of(folder: Path) -> tuple[str, str] | None:
    """The file that gives ``folder`` away and the plugin of this project for it."""
    return next(((file, name) for file, name in LAYOUTS.items() if (folder / file).is_file()), None)
