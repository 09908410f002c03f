"""Folders: what the adapters of plugins load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt.modelfiles import pickles
from kpt.modelfiles.adapters import LAYOUTS, adapters, layout_of, missing
from kpt.modelfiles.base import LoadedModel, ModelFileError, Notice
from kpt.plugins import registry as installed_plugins
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line
from kpt.specs import AdapterError

if TYPE_CHECKING:
    from kpt.plugins import Registered, Registry
    from kpt.specs import Adapter, AdapterSpec


def from_folder(path: Path, trust: bool, registry: Registry | None, tell: Notice) -> LoadedModel:
    """The model in a folder, by whoever knows its layout. Raises `ModelFileError`.

    What would be executed while it is loaded is refused without ``trust``, before any adapter loads it.
    An adapter that breaks is told of, and the next one is asked.
    """
    if (path / "recipe.json").is_file():
        raise ModelFileError(
            "artifact",
            f"{path} is an artifact of kpt, already optimised.",
            f"Load it with kpt.load({str(path)!r}).",
        )
    plugins = installed_plugins() if registry is None else registry
    failure = ""
    for registered, adapter in adapters(plugins, tell):
        outcome = attempt(_load, registered, adapter, path, trust, tell)
        if isinstance(outcome.error, ModelFileError):
            raise outcome.error
        if outcome.error is not None:
            failure = f"{registered.owner} could not load {path}: {one_line(outcome.error)}"
            tell(failure)
        elif outcome.value is not None:
            return LoadedModel(outcome.value.eval(), "folder", path, build={"folder": str(path)})
    raise _unknown(path, plugins, failure)


def _load(
    registered: Registered[AdapterSpec], adapter: Adapter, path: Path, trust: bool, tell: Notice
) -> Any:
    """The module that ``adapter`` makes of the folder, or None where the folder is not of its library."""
    try:
        executed = tuple(adapter.executes(str(path)))
        if executed:
            _require_trust(path, executed, trust, tell)
        found = adapter.load(str(path), trust=trust)
    except AdapterError as error:
        raise ModelFileError(error.code, error.message, error.hint) from error
    import torch

    if found is not None and not isinstance(found, torch.nn.Module):
        raise TypeError(f"its load returned a {type(found).__name__}; expected a torch.nn.Module or None")
    return found


def _require_trust(path: Path, executed: tuple[str, ...], trust: bool, tell: Notice) -> None:
    if not trust:
        raise ModelFileError(
            "untrusted",
            f"Loading {path} executes what comes with it: {', '.join(executed)}.",
            "Pass --trust-model if you trust where it comes from.",
        )
    tell(f"{path} is executed while it is loaded, as --trust-model allows.")
    for name in executed:
        file = path / name
        if not file.is_file():
            tell(f"  {name}")
        elif file.suffix == ".py":
            tell(f"  {name}  sha256 {pickles.sha256(file)}")
        else:
            facts = pickles.inspect(file)
            named = ", ".join(facts.globals) or "none"
            tell(f"  {name}  sha256 {facts.sha256}  globals {named}")


def _unknown(path: Path, plugins: Registry, failure: str) -> ModelFileError:
    if failure:
        return ModelFileError(
            "adapter-failed", f"{failure}.", "Mend that plugin, or report it to its author."
        )
    layout = layout_of(path)
    if layout is None:
        return ModelFileError(
            "not-a-model",
            f"The folder {path} has no {' or '.join(LAYOUTS)}, and no plugin knows what it is.",
            "Pass a file of weights with --arch module:factory, or a folder that an installed plugin loads.",
        )
    file, name = layout
    offered = {registered.plugin for registered in plugins.specs("kpt_model_adapters")}
    if name in offered:
        return ModelFileError(
            "not-a-model",
            f"The folder {path} has a {file}, but it describes no model that an installed plugin knows.",
            "Pass a file of weights with --arch module:factory.",
        )
    reason, mend = missing(name, plugins)
    return ModelFileError(
        "missing-plugin", f"Loading {path}, a folder with a {file}, needs {reason}.", f"To mend it: {mend}"
    )
