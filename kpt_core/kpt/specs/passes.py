"""Passes and precision policies: reversible changes of a model, and what they offer to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kpt.specs.hardware import HardwareProfile
from kpt.specs.observation import Observation
from kpt.specs.words import Level, Mode, Phase

if TYPE_CHECKING:
    import torch

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Variant:
    """A pass with its parameters chosen.

    ``predicted_gain`` is the expected ratio latency before / after; ``setup_seconds`` what
    applying and warming it up is expected to cost, and ``compile_ratio`` how many times longer compilers
    take beside it. ``sites`` are the paths of the modules whose
    ``forward`` it owns ("" is the root). ``compute_dtype`` names the dtype that the arithmetic drops to,
    ``None`` when dtypes stay. ``derives`` says that copies made from weights are held, so that the
    weights have to be watched. ``touches_mask`` asks the referee to judge with padding, and
    ``reproducible`` promises bitwise equal results from run to run.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    predicted_gain: float = 1.0
    setup_seconds: float = 0.0
    compile_ratio: float = 1.0
    sites: tuple[str, ...] = ("",)
    compute_dtype: str | None = None
    level: Level | None = None
    derives: bool = False
    touches_mask: bool = False
    reproducible: bool = False
    note: str = ""


@dataclass(frozen=True)
class Skip:
    """A pass has nothing to offer here; the reason goes into the receipt."""

    reason: str


Undo = Callable[[], None]


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Undo:
    """Have ``forward`` called in place of the module's own; the result puts back what was there before.

    What stood there may have been the class's method or a forward that was set on the instance.
    """
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign, assignment]

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    return undo


@dataclass(frozen=True)
class PassSpec:
    """A reversible change of a model. ``entry`` names a class (or instance) that is a `Pass`.

    Tags order passes inside a phase: one that requires a tag comes after those that provide it;
    two with a conflicting tag are never in one plan.
    """

    name: str
    phase: Phase
    entry: str
    level: Level = "exact"
    modes: tuple[Mode, ...] = ("inference",)
    hardware: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    priority: int = 0
    summary: str = ""


@runtime_checkable
class Pass(Protocol):
    """The behaviour behind a `PassSpec` or a `PolicySpec`.

    It may have a further method, ``calibrate(model, variant, run)``, which is called before ``apply`` with
    the same workspace: ``run()`` calls the model on up to four of the user's examples, so that hooks put on
    its modules see what flows through them (ranges of activations, for scales). The hooks have to be off
    again when it returns.
    """

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterable[Variant | Skip]:
        """Variants worth a trial, each with its predicted gain, or a `Skip` with the reason."""

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        """Change ``model`` and return what changes it back.

        ``model`` is a workspace: its modules are private copies that the pass may change freely,
        its parameters and buffers are the user's own tensors and must not be written to.
        """

    def verify_applied(self, model: torch.nn.Module) -> bool:
        """Whether the variant had an observable effect once the model ran."""


@dataclass(frozen=True)
class PolicySpec:
    """A precision policy: which dtype modules compute and store in. ``entry`` names a `Pass`."""

    name: str
    entry: str
    compute_dtype: str
    storage_dtype: str | None = None
    level: Level = "production"
    modes: tuple[Mode, ...] = ("inference",)
    hardware: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    priority: int = 0
    summary: str = ""
