"""Ops, and the kernels that implement them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kpt.specs.words import Level

if TYPE_CHECKING:
    import torch

    from kpt.ops.sites import Site


@dataclass(frozen=True)
class OpSpec:
    """A named computation.

    ``reference`` names a function in plain PyTorch that runs in fp64 and defines the signature
    that every kernel of the op has; ``recogniser`` names a `Recogniser`.
    """

    name: str
    signature: str
    reference: str
    recogniser: str | None = None
    summary: str = ""


class Recogniser(Protocol):
    """Proposes what a site might compute; the core proves or refutes each hypothesis.

    Two more methods may be there. ``function_hypotheses(module, captured)`` is asked about functions that
    ``module`` calls by name. ``regions(graph)`` yields `kpt.ops.regions.Region` objects for arithmetic that a
    captured graph holds in line; ``hypotheses`` is then asked about each as about a module. Beside it
    ``marks`` maps each op to the names of torch operations of which one has to run for a graph to hold it:
    without one of these no graph is captured.
    """

    def hypotheses(self, module: torch.nn.Module, captured: Any) -> Iterable[Any]:
        """`kpt.ops.Hypothesis` objects for ``module``, given its captured inputs."""


@dataclass(frozen=True)
class KernelSpec:
    """One implementation of an op.

    ``entry`` names a function with the op's reference signature. ``supports`` names
    ``supports(site) -> str | None`` (a reason to refuse); ``setup`` names
    ``setup(site) -> callable`` which may pack weights once and returns the function to call
    instead of ``entry``; a kernel with a ``setup`` holds derived weights unless
    ``derives=False``. ``dtypes`` and ``hardware`` (device types or profile names) are empty for
    "any". ``predict`` names ``predict(observation, hardware, sites) -> float``, the expected ratio latency
    before / after where measured rates tell it; without one ``predicted_gain`` stands for every model.
    ``tuner`` names a `Tuner`, which several kernels may share; ``kpt bench --tune`` runs it.
    """

    op: str
    name: str
    entry: str
    hardware: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    level: Level = "exact"
    backward: bool = False
    compile_safe: bool = False
    reproducible: bool = False
    priority: int = 0
    supports: str | None = None
    setup: str | None = None
    derives: bool | None = None
    tuner: str | None = None
    predict: str | None = None
    predicted_gain: float = 1.05
    source: str = ""

    @property
    def holds_weights(self) -> bool:
        return self.setup is not None if self.derives is None else self.derives


class KernelSetup(Protocol):
    """Prepares one site once, for instance by packing its weights."""

    def __call__(self, site: Site) -> Callable[..., Any]: ...


class Tuner(Protocol):
    """Times the options of kernels on the device that is here and stores the best ones."""

    def __call__(
        self, only: tuple[str, ...], seconds: float, folder: str | None, tell: Callable[[str], None]
    ) -> Mapping[str, Any]:
        """Tune the kernels named in ``only`` (all if empty), ``seconds`` of timing for each option.

        Writes a table into ``folder`` (the user's own by default), which the kernels read from then on.
        Returns ``path``, ``architecture`` and ``rows`` (what was chosen, with the times of the rule's
        choice and of the best, in milliseconds). Raises `ValueError` for an unknown name and
        `RuntimeError` where there is no device to measure on.
        """
