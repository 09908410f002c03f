"""Candidates and plans: which variants exist, which go together, and in what order they are applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kpt.specs import LEVELS, PHASES, WRAPPING, Phase, Variant

if TYPE_CHECKING:
    from kpt.specs import Level

#: Phases of which a plan holds at most one variant.
EXCLUSIVE = frozenset({"precision", "compile"})


@dataclass(frozen=True, eq=False)
class Candidate:
    """One variant together with who offers it.

    ``make`` gives a new instance of the behaviour for each application, so that what an instance
    remembers (tables, compiled functions) never mixes two trials. ``kernel`` says that it puts a kernel at
    sites; a pass may be of the same phase. ``dtypes`` are those a kernel computes in, empty for any;
    ``left_out`` the kinds of sites (`kpt.kernels.kind_of`) that it must not serve.
    """

    variant: Variant
    phase: Phase
    plugin: str
    source: str
    make: Callable[[], Any]
    level: Level = "exact"
    kernel: bool = False
    dtypes: tuple[str, ...] = ()
    provides: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    priority: int = 0
    left_out: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.source}:{self.variant.name}" if self.variant.name != self.source else self.source

    @property
    def gain(self) -> float:
        return float(self.variant.predicted_gain)

    def to_dict(self) -> dict[str, Any]:
        """The step as a recipe stores it."""
        left_out = {"left_out": sorted(self.left_out)} if self.left_out else {}
        return {
            "phase": self.phase,
            "plugin": self.plugin,
            "source": self.source,
            "variant": {
                **plain(asdict(replace(self.variant, params={}))),
                "params": plain({**self.variant.params, **left_out}),
            },
        }


@dataclass(frozen=True)
class Plan:
    """Variants in the order in which they are applied."""

    steps: tuple[Candidate, ...] = ()

    @staticmethod
    def of(candidates: Iterable[Candidate]) -> Plan:
        """Order candidates by wrapping, then by their tags, then by priority and name."""
        groups: dict[str, list[Candidate]] = {phase: [] for phase in WRAPPING}
        for candidate in candidates:
            groups[candidate.phase].append(candidate)
        return Plan(tuple(step for phase in WRAPPING for step in _by_tags(groups[phase])))

    @property
    def key(self) -> str:
        return " + ".join(step.name for step in self.steps) or "eager"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.steps)

    @property
    def derives(self) -> bool:
        return any(step.variant.derives for step in self.steps)

    @property
    def touches_mask(self) -> bool:
        return any(step.variant.touches_mask for step in self.steps)

    @property
    def level(self) -> Level:
        """The strictest level whose rules allow every step."""
        return max((step.level for step in self.steps), key=LEVELS.index, default="exact")

    @property
    def bold(self) -> frozenset[Candidate]:
        """The steps without which its level would be a stricter one; none of an exact plan."""
        level = self.level
        return frozenset(step for step in self.steps if step.level == level != "exact")

    def stricter_than(self, other: Plan) -> bool:
        return LEVELS.index(self.level) < LEVELS.index(other.level)

    @property
    def compute_dtype(self) -> str | None:
        for step in self.steps:
            if step.variant.compute_dtype:
                return step.variant.compute_dtype
        return None

    @property
    def provided(self) -> frozenset[str]:
        """The tags that its steps provide, their sources among them."""
        return frozenset(tag for step in self.steps for tag in (step.source, *step.provides))

    def without(self, candidate: Candidate) -> Plan:
        return Plan(tuple(step for step in self.steps if step is not candidate))

    def with_(self, candidate: Candidate) -> Plan:
        """The plan with ``candidate`` in place of whatever it excludes."""
        return Plan.of([step for step in self.steps if excludes(step, candidate) is None] + [candidate])

    def __len__(self) -> int:
        return len(self.steps)


def excludes(left: Candidate, right: Candidate) -> str | None:
    """Why two candidates cannot be in one plan, or None."""
    if left.source == right.source and not left.kernel:
        return f"both are variants of {left.source}"
    if left.phase == right.phase and left.phase in EXCLUSIVE:
        return f"a plan holds one {left.phase} variant"
    tags = (left.conflicts & (right.provides | {right.source})) | (
        right.conflicts & (left.provides | {left.source})
    )
    if tags:
        return f"they conflict over {', '.join(sorted(tags))}"
    shared = (set(left.variant.sites) & set(right.variant.sites)) - {""}
    if shared:
        return f"both own {min(shared)}"
    for kernel, other in ((left, right), (right, left)):
        wanted = other.variant.compute_dtype
        if kernel.dtypes and wanted and wanted not in kernel.dtypes:
            return f"{kernel.name} computes in {', '.join(kernel.dtypes)} and {other.name} in {wanted}"
    return None


def worth(candidate: Candidate, budget: float) -> float:
    """The predicted gain, less what its set-up costs of the budget: a trial that takes all of it had
    better be the only one."""
    return candidate.gain / (1.0 + candidate.variant.setup_seconds / budget)


def assemble(
    candidates: Iterable[Candidate], *, budget: float = 120.0, limit: int | None = None, fixed: bool = False
) -> Plan:
    """The stack of best predictions: greedily by their worth, skipping what is excluded.

    Predictions rest on measured rates; a ``fixed`` order does without them.
    """
    chosen: list[Candidate] = []
    for candidate in sorted(
        candidates,
        key=lambda c: (0.0 if fixed else -worth(c, budget), PHASES.index(c.phase), -c.priority, c.name),
    ):
        if limit is not None and len(chosen) >= limit:
            break
        if worth(candidate, budget) > 1.0 and all(excludes(candidate, other) is None for other in chosen):
            chosen.append(candidate)
    provided = Plan.of(chosen).provided
    return Plan.of(c for c in chosen if c.requires <= provided)


def _by_tags(group: list[Candidate]) -> list[Candidate]:
    """Who requires a tag comes after those that provide it; else by priority, then name."""
    waiting = sorted(group, key=lambda c: (c.priority, c.name))
    ordered: list[Candidate] = []
    while waiting:
        open_tags = {tag for c in waiting for tag in c.provides}
        ready = [c for c in waiting if not (c.requires & open_tags) or c.requires & open_tags <= c.provides]
        ordered.append((ready or waiting)[0])
        waiting.remove(ordered[-1])
    return ordered


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back.

    Raises:
        TypeError: a variant's parameters hold something that is no JSON value (NaN and infinity are none).
    """
    if isinstance(value, Mapping):
        value = dict(value)
    try:
        return json.loads(json.dumps(value, default=_plain_default, allow_nan=False))
    except ValueError as error:
        raise TypeError(f"variant parameters must be JSON values ({error})") from error


def _plain_default(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"variant parameters must be JSON values; got {type(value).__name__}")


@dataclass
class Proposals:
    """What plugins offered for one observation, and what they declined."""

    candidates: list[Candidate] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def offer(self, **facts: Any) -> None:
        """Add a `Candidate` with these fields; lower layers offer without knowing its class."""
        self.candidates.append(Candidate(**facts))

    def skip(self, source: str, plugin: str, phase: str, reason: str) -> None:
        self.skipped.append({"name": source, "plugin": plugin, "phase": phase, "reason": reason})
