"""Model libraries: what each knows about its own models and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdapterSpec:
    """Knowledge of the library that a model family comes from. ``entry`` names an `Adapter`.

    ``library`` is the name that the library is imported by. Artifacts remember ``name``, so that the
    same adapter builds the model again.
    """

    name: str
    entry: str
    library: str


class AdapterError(Exception):
    """A folder or description is the adapter's, and no model comes of it.

    ``code`` is for programs ("missing-package", "truncated", "missing-keys", "not-buildable", …),
    ``message`` says what was found and expected, ``hint`` what to do.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


class Adapter(Protocol):
    """What a model library knows about its models and their files.

    `executes` and `load` serve the command line, which is given folders; `describe` and `build` serve
    artifacts; the others are asked about a model that is there.
    """

    def matches(self, model: torch.nn.Module) -> bool:
        """Whether ``model`` is one of this library's; imports nothing that the program has not imported."""

    def example_inputs(self, model: torch.nn.Module) -> Mapping[str, Any] | None:
        """Keyword arguments of a typical call on the model's device, or None when the library cannot tell.

        The same model gets the same values; the model and torch's random state are left as they were.
        """

    def blocks(self, model: torch.nn.Module) -> tuple[str, ...]:
        """Paths of the repeated blocks, outermost first."""

    def executes(self, folder: str) -> tuple[str, ...]:
        """What loading ``folder`` would execute: names of files in it, or a few words for anything else.

        Empty where nothing is executed or the folder is not one of this library's. The core refuses what
        is not empty unless the user trusts it, and shows the files with their hashes first.
        """

    def load(self, folder: str, *, trust: bool) -> torch.nn.Module | None:
        """The model in ``folder``, or None when the folder is not one of this library's.

        Without ``trust`` nothing from the folder may be executed. Raises `AdapterError`.
        """

    def describe(self, model: torch.nn.Module, folder: str) -> Mapping[str, Any] | None:
        """How `build` makes ``model`` again without its weights, as JSON values; None if it cannot.

        Files that `build` reads (a configuration) are written into ``folder``, which is empty; they become
        part of the artifact, beside the core's own ``model.safetensors``, ``recipe.json``,
        ``receipt.json``, ``structure.pkl`` and ``verify/``.
        """

    def build(self, description: Mapping[str, Any], folder: str) -> torch.nn.Module:
        """The model that ``description`` describes, its weights unspecified; ``folder`` as in `describe`.

        The artifact may come from anybody: only this library's own classes may be called. Raises
        `AdapterError`.
        """
