"""What plugin hooks return, and what the behaviour behind them has to offer.

A *spec* is data: a frozen dataclass of names, numbers and ``"module:attr"`` strings, so that a
plugin module imports nothing heavy. The attribute behind such a string is imported when it is first
used and has to satisfy the `Protocol` named in the spec's field comment.

Nothing here imports torch; types that mention it are strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from kpt.ops.sites import Site
    from kpt.transaction.observe import Observation

Level = Literal["exact", "production", "aggressive"]
Mode = Literal["inference", "training", "generation"]
Objective = Literal["latency", "throughput", "memory"]
Phase = Literal["layout", "kernels", "precision", "shapes", "compile", "runtime"]

LEVELS: tuple[Level, ...] = ("exact", "production", "aggressive")
MODES: tuple[Mode, ...] = ("inference", "training", "generation")
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "memory")
#: The order in which the phases are decided.
PHASES: tuple[Phase, ...] = ("layout", "kernels", "precision", "shapes", "compile", "runtime")
#: The order in which a plan is applied, from the innermost change to the outermost wrapper: weights
#: are converted before kernels pack them, and what a shape variant does to a call (drop a mask, pack
#: a batch) happens before compiled code is entered.
WRAPPING: tuple[Phase, ...] = ("precision", "layout", "kernels", "compile", "shapes", "runtime")

_EMPTY: Mapping[str, Any] = MappingProxyType({})


# ---------------------------------------------------------------------------------------------
# Hardware


@dataclass(frozen=True)
class HardwareProfile:
    """Facts about one device. Rates are measured on it, never taken from a table.

    ``bandwidth`` is bytes per second of a device copy (bytes read + bytes written);
    ``matmul_rates`` maps a dtype name to floating (or integer) operations per second;
    ``native_dtypes`` are the dtypes that the device multiplies in hardware.
    """

    name: str
    device_type: str
    vendor: str = "unknown"
    architecture: str = "unknown"
    compute_units: int = 0
    memory_bytes: int = 0
    bandwidth: float = 0.0
    matmul_rates: Mapping[str, float] = field(default_factory=dict)
    native_dtypes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    triton_target: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def predicted_seconds(self, bytes_moved: float, operations: float, dtype: str) -> float:
        """Roofline time in seconds of ``operations`` in ``dtype`` that move ``bytes_moved`` bytes."""
        rate = self.matmul_rates.get(dtype) or self.matmul_rates.get("float32") or 0.0
        memory = bytes_moved / self.bandwidth if self.bandwidth else 0.0
        return max(memory, operations / rate if rate else 0.0)


@dataclass(frozen=True)
class HardwareSpec:
    """One kind of device. ``probe`` names a `Probe`."""

    name: str
    device_type: str
    probe: str
    priority: int = 0


class Probe(Protocol):
    """Finds one kind of device without initialising it, and measures it on request."""

    def detect(self) -> HardwareProfile | str:
        """The profile without measured rates, or the reason why the device is absent."""

    def measure(self, profile: HardwareProfile) -> HardwareProfile:
        """The same profile with measured bandwidth and matmul rates."""


# ---------------------------------------------------------------------------------------------
# Ops and kernels


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
    """Proposes what a site might compute; the core proves or refutes each hypothesis."""

    def hypotheses(self, module: torch.nn.Module, captured: Any) -> Iterable[Any]:
        """`kpt.ops.sites.Hypothesis` objects for ``module``, given its captured inputs."""


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


# ---------------------------------------------------------------------------------------------
# Passes and precision policies


@dataclass(frozen=True)
class Variant:
    """A pass with its parameters chosen.

    ``predicted_gain`` is the expected ratio latency before / after; ``setup_seconds`` what
    applying and warming it up is expected to cost. ``sites`` are the paths of the modules whose
    ``forward`` it owns ("" is the root). ``compute_dtype`` names the dtype that the arithmetic drops to,
    ``None`` when dtypes stay. ``derives`` says that copies made from weights are held, so that the
    weights have to be watched. ``touches_mask`` asks the referee to judge with padding, and
    ``reproducible`` promises bitwise equal results from run to run.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    predicted_gain: float = 1.0
    setup_seconds: float = 0.0
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
    """The behaviour behind a `PassSpec` or a `PolicySpec`."""

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


# ---------------------------------------------------------------------------------------------
# Models, export, deployment, tracking, launching, comparing


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

        Files that `build` reads (a configuration) are written into ``folder``, which holds nothing yet
        but what the core writes: ``*.safetensors``, ``recipe.json``, ``receipt.json``, ``verify/``.
        """

    def build(self, description: Mapping[str, Any], folder: str) -> torch.nn.Module:
        """The model that ``description`` describes, its weights unspecified; ``folder`` as in `describe`.

        The artifact may come from anybody: only this library's own classes may be called. Raises
        `AdapterError`.
        """


@dataclass(frozen=True)
class ExporterSpec:
    """Writes an optimised model in another format. ``entry`` names an `Exporter`."""

    name: str
    entry: str
    format: str
    suffix: str = ""


class Exporter(Protocol):
    def export(self, model: torch.nn.Module, example_inputs: Any, path: str) -> str: ...


@dataclass(frozen=True)
class TargetSpec:
    """A place to deploy to. ``entry`` names a `Target`."""

    name: str
    entry: str
    summary: str = ""


class Target(Protocol):
    def plan(self, artifact: str, options: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def apply(self, plan: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]: ...

    def status(self, name: str) -> Mapping[str, Any]: ...

    def destroy(self, name: str) -> Iterable[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class TrackerSpec:
    """Records receipts elsewhere. ``entry`` names a `Tracker`."""

    name: str
    entry: str
    summary: str = ""


class Tracker(Protocol):
    def record(self, receipt: Mapping[str, Any]) -> None:
        """Store one receipt, as `Receipt.to_dict` gives it."""


@dataclass(frozen=True)
class LauncherSpec:
    """Starts a job on several processes or machines. ``entry`` names a `Launcher`."""

    name: str
    entry: str
    summary: str = ""


class Launcher(Protocol):
    def command(self, job: Mapping[str, Any]) -> list[str]: ...


@dataclass(frozen=True)
class ContenderSpec:
    """Somebody that ``kpt bench`` compares with. ``entry`` names a `Contender`.

    ``requires`` are importable names; a contender whose names are missing is reported as absent.
    """

    name: str
    entry: str
    requires: tuple[str, ...] = ()
    level: Level = "exact"
    summary: str = ""


class Contender(Protocol):
    def prepare(
        self, model: torch.nn.Module, example: Mapping[str, Any]
    ) -> Callable[[Mapping[str, Any]], Any]:
        """A function that runs one call, given its inputs by name."""


#: Every spec type, by the hook that collects it.
SPEC_TYPES: Mapping[str, type] = MappingProxyType(
    {
        "kpt_hardware": HardwareSpec,
        "kpt_ops": OpSpec,
        "kpt_kernels": KernelSpec,
        "kpt_precision_policies": PolicySpec,
        "kpt_passes": PassSpec,
        "kpt_model_adapters": AdapterSpec,
        "kpt_exporters": ExporterSpec,
        "kpt_deploy_targets": TargetSpec,
        "kpt_trackers": TrackerSpec,
        "kpt_launchers": LauncherSpec,
        "kpt_contenders": ContenderSpec,
    }
)
