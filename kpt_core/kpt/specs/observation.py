"""What passes are told about a model and its calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kpt.specs.hardware import HardwareProfile
from kpt.specs.words import Level, Mode, Objective

if TYPE_CHECKING:
    import torch

    from kpt.judge.calls import Call
    from kpt.judge.draws import InputSpec
    from kpt.ops.sites import Site


@dataclass(frozen=True)
class Observation:
    """Facts about one model and its calls, as passes see them.

    ``model`` is read only. ``baseline_seconds`` is the eager latency of a call, ``operations`` its
    floating-point operations as torch's flop counter sees them (matrix products and convolutions); where the
    examples are of several kinds, both are means over these, weighed with their shares.
    ``stochastic`` says that outputs depend on the random seed, as they do with dropout in training,
    ``samples`` that in training they do so without dropout modules, too (noise, skipped blocks), so that only
    the random numbers that eager draws give eager's values,
    ``moving`` which attributes of objects that modules hold (by the object's id) each call changes.
    ``unfinished_proofs`` counts what may be an op's site and was not proved for lack of time,
    ``writes_inputs`` says that the forward changes tensors that it is given. ``detached`` names the outputs
    that carry no gradient where gradients are recorded: in a call like the examples, and in one whose inputs
    require gradients. ``unrepeatable`` says in what a second run of one call would differ from the first (in
    random numbers, or in buffers, inputs or counters that the forward writes to), or is empty.
    """

    model: torch.nn.Module
    calls: tuple[Call, ...]
    spec: InputSpec
    mode: Mode
    level: Level
    objective: Objective
    hardware: HardwareProfile
    device_type: str
    sites: tuple[Site, ...] = ()
    left_alone: tuple[tuple[str, str], ...] = ()
    census: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    parameter_dtypes: frozenset[str] = frozenset()
    baseline_seconds: float = 0.0
    operations: float = 0.0
    deterministic: bool = False
    stochastic: bool = False
    samples: bool = False
    budget_left: float = 120.0
    ambient: tuple[Any, ...] = ()
    moving: frozenset[tuple[int, str]] = frozenset()
    unfinished_proofs: int = 0
    writes_inputs: bool = False
    detached: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    unrepeatable: str = ""

    @property
    def dynamic(self) -> bool:
        """Whether any dimension was declared dynamic."""
        return any(leaf.dims for leaf in self.spec.leaves)

    @property
    def training(self) -> bool:
        return self.mode == "training"
