"""What every way of loading a model shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kpt.plugins.status import one_line

if TYPE_CHECKING:
    import torch

Kind = Literal["state-dict", "safetensors", "folder", "pickle", "exported"]
#: Where a line for the user goes.
Notice = Callable[[str], None]
_SHOWN = 8


class ModelFileError(Exception):
    """A model cannot be loaded. ``code`` is for programs, ``hint`` says what to do."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and where it comes from.

    ``build`` says how the model is built again without its weights (``{"arch": ...}``, or
    ``{"folder": ...}`` with the path of a folder or of an exported program); it is empty for a pickle,
    which can only be loaded again. ``example`` is the call that comes with an exported program: its
    positional and its keyword arguments.
    """

    model: torch.nn.Module
    kind: Kind
    path: Path
    sha256: str = ""
    build: Mapping[str, str] = field(default_factory=dict)
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def unreadable(path: Path, error: BaseException) -> ModelFileError:
    return ModelFileError(
        "truncated", f"{path} cannot be read: {one_line(error)}.", "Download or save it again."
    )


def some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
