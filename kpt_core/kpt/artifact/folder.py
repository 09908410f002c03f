"""The layout of an artifact's folder, and the checks that hold for every reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line
from kpt.specs import LEVELS, OBJECTIVES

if TYPE_CHECKING:
    import torch

SCHEMA = 1
RECIPE = "recipe.json"
RECEIPT = "receipt.json"
WEIGHTS = "model.safetensors"
VERIFY = "verify"
STRUCTURE = "structure.pkl"
#: What the core writes; an adapter's files have other names.
OWN = (RECIPE, RECEIPT, WEIGHTS, VERIFY, STRUCTURE)


_KINDS: dict[str, type | tuple[type, ...]] = {
    "plan": (dict, NoneType),
    "build": dict,
    "aliases": dict,
    "training": bool,
    "request": dict,
    "verify": (dict, NoneType),
    "files": dict,
}


class ArtifactError(RuntimeError):
    """An artifact that cannot be used. ``code`` is for programs, ``hint`` says what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


def sha256(path: Path) -> str:
    """The file's checksum, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """``recipe.json``, once every file that it names has the checksum that it names.

    Raises:
        ArtifactError: no artifact, another schema version, or a file that is missing or differs.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ArtifactError(
            "not-an-artifact",
            f"{folder} has no {RECIPE}, so it is no artifact.",
            "Write one with kpt.save(model, folder).",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            "damaged", f"{path} cannot be read: {error}.", "Save the artifact again."
        ) from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ArtifactError(
            "schema",
            f"{path} has schema {found!r}; this version of kpt reads {SCHEMA}.",
            "Save the artifact again.",
        )
    for key, kinds in _KINDS.items():
        if key not in data or not isinstance(data[key], kinds):
            found = type(data[key]).__name__ if key in data else "nothing"
            raise ArtifactError(
                "damaged",
                f"{path} has {found} as {key!r}.",
                "Save the artifact again.",
            )
    request = data["request"]
    if request.get("level") not in LEVELS or request.get("objective") not in OBJECTIVES:
        raise ArtifactError(
            "damaged", f"{path} has no known level and objective in 'request'.", "Save the artifact again."
        )
    files = data["files"]
    if WEIGHTS not in files:
        raise ArtifactError("damaged", f"{path} does not name {WEIGHTS}.", "Save the artifact again.")
    for name, expected in files.items():
        file = (folder / name).resolve()
        if folder.resolve() not in file.parents:
            raise ArtifactError(
                "damaged", f"{path} names {name!r}, which is outside of the folder.", "Do not use it."
            )
        if not file.is_file():
            raise ArtifactError(
                "damaged", f"{file} is missing.", "Copy the whole folder, or save the artifact again."
            )
        if sha256(file) != expected:
            raise ArtifactError(
                "checksum",
                f"{file} is not the file that was saved: its sha256 differs.",
                "Copy or save it again.",
            )
    return data


def missing_packages() -> list[str]:
    """Packages that tensors are stored with and that are not installed; ``kpt-core[torch]`` brings them."""
    return [name for name in ("safetensors", "numpy") if find_spec(name) is None]


def require_packages() -> None:
    """Raise `ArtifactError` where a package that artifacts are stored with is not installed."""
    missing = missing_packages()
    if missing:
        raise ArtifactError(
            "missing-package",
            f"Without the package {' and '.join(missing)} no artifact can be stored or read.",
            f"To mend it: pip install {' '.join(missing)}",
        )


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Store tensors by name in the safetensors file ``path``. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(path))
    except SafetensorError as error:  # which is what it makes of a full disk
        raise OSError(f"{path.name}: {one_line(error)}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name. Raises `ArtifactError` where it is none."""
    require_packages()
    from safetensors.torch import load_file

    found = attempt(load_file, str(path))
    if found.error is not None:
        raise ArtifactError(
            "damaged", f"{path} cannot be read: {one_line(found.error)}.", "Save the artifact again."
        ) from found.error
    return found.value or {}
