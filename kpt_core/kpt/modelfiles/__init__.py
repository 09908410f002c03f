"""Models from files: safe weights, folders that a plugin's adapter knows, and pickles on request.

Weights are read without executing anything. What is executable, a pickled module or an exported
program, is run only with ``trust=True``, after its hash and the globals that it names were shown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kpt.modelfiles.base import LoadedModel, ModelFileError, Notice

if TYPE_CHECKING:
    from kpt.plugins import Registry

__all__ = ["LoadedModel", "ModelFileError", "load_model"]


def load_model(
    path: str | Path,
    *,
    arch: str | None = None,
    trust: bool = False,
    registry: Registry | None = None,
    notice: Notice | None = None,
) -> LoadedModel:
    """Load the model at ``path``: a state dict, a safetensors file, a folder or a pickle.

    ``arch`` (``"module:factory"``) builds the module that weights are loaded into. ``trust`` allows
    files that execute code while they are loaded; ``notice`` is told before they do, and of other
    things worth knowing (default: a line on stderr). Raises `ModelFileError`.
    """
    from kpt.modelfiles.files import from_torch_file, read_safetensors
    from kpt.modelfiles.folders import from_folder
    from kpt.modelfiles.weights import with_weights

    path = Path(path)
    tell = notice or _to_stderr
    if path.is_dir():
        return from_folder(path, trust, registry, tell)
    if not path.exists():
        raise ModelFileError("not-found", f"There is no file {path}.", "Check the path given as --model.")
    if not path.is_file():
        raise ModelFileError("not-a-file", f"{path} is neither a file nor a folder.", "Pass a path to one.")
    if path.stat().st_size == 0:
        raise ModelFileError("truncated", f"{path} is empty.", "Download or save it again.")
    if path.suffix == ".safetensors":
        return with_weights(path, "safetensors", read_safetensors(path), arch, tell)
    return from_torch_file(path, arch, trust, tell)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
