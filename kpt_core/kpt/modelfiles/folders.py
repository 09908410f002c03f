"""Folders: what a plugin's adapter or transformers loads."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt.modelfiles.base import LoadedModel, ModelFileError, Notice, some
from kpt.modelfiles.pickles import sha256
from kpt.plugins import instantiate
from kpt.plugins import registry as installed_plugins
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line

if TYPE_CHECKING:
    from kpt.plugins import Registry


def from_folder(path: Path, trust: bool, registry: Registry | None, tell: Notice) -> LoadedModel:
    """The model in a folder, by whoever knows its layout. Raises `ModelFileError`."""
    if (path / "recipe.json").is_file():
        raise ModelFileError(
            "artifact",
            f"{path} is an artifact of kpt, already optimised.",
            f"Load it with kpt.load({str(path)!r}).",
        )
    plugins = installed_plugins() if registry is None else registry
    for registered in plugins.specs("kpt_model_adapters"):
        outcome = attempt(lambda entry=registered.spec.entry: instantiate(entry).load(str(path)))
        if outcome.error is not None:
            tell(f"{registered.owner} could not load {path}: {one_line(outcome.error)}")
        elif outcome.value is not None:
            return LoadedModel(outcome.value.eval(), "huggingface", path, build={"folder": str(path)})
    config = path / "config.json"
    if not config.is_file():
        raise ModelFileError(
            "not-a-model",
            f"The folder {path} has no config.json, and no plugin knows what it is.",
            "Pass a file of weights with --arch module:factory, or a Hugging Face folder.",
        )
    return _from_transformers(path, config, trust, tell)


def _from_transformers(path: Path, config: Path, trust: bool, tell: Notice) -> LoadedModel:
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError("truncated", f"{config} is not JSON: {error}.", "Download it again.") from error
    if not isinstance(facts, dict):
        raise ModelFileError("not-a-model", f"{config} is not a model's configuration.", "Download it again.")
    if find_spec("transformers") is None:
        raise ModelFileError(
            "missing-package", f"Loading the folder {path} needs a package.", "pip install transformers"
        )
    if facts.get("auto_map"):
        code = {file.name: sha256(file) for file in sorted(path.glob("*.py"))}
        if not trust:
            raise ModelFileError(
                "untrusted",
                f"The model in {path} comes with its own code: {', '.join(code) or facts['auto_map']}.",
                "Pass --trust-model if you trust where it comes from.",
            )
        tell(f"{path}: its own code is executed, as --trust-model allows.")
        for name, digest in code.items():
            tell(f"  sha256  {digest}  {name}")
    import transformers

    names = facts.get("architectures") or []
    loader = getattr(transformers, str(names[0]), None) if names and not facts.get("auto_map") else None
    loader = loader or transformers.AutoModel
    outcome = attempt(
        loader.from_pretrained, path, local_files_only=True, trust_remote_code=trust, output_loading_info=True
    )
    if outcome.error is not None:
        raise ModelFileError(
            "truncated",
            f"{path} cannot be loaded by transformers: {one_line(outcome.error)}.",
            "Check that the folder holds config.json and all weight files.",
        ) from outcome.error
    loaded: Any = outcome.value
    model, info = loaded
    # transformers fills what is missing with random numbers and goes on; nobody wants that optimised.
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelFileError(
            "missing-keys", f"The weights in {path} lack {some(missing)}.", "Download it again."
        )
    return LoadedModel(model.eval(), "huggingface", path, build={"folder": str(path)})
