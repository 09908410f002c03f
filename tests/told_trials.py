"""Searches whose trials take the time that they are told to, by a clock of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kpt.judge.timing import Timing
from kpt.specs import Level, Phase, Variant
from kpt.transaction.budget import Budget
from kpt.transaction.ledger import Ledger
from kpt.transaction.outcome import Outcome
from kpt.transaction.plan import Candidate, Plan
from kpt.transaction.search import Search

FASTER = Timing(2.0, 1.9, 2.1, 1.0, 0.5, 16)


class Trials:
    """Trials that take the time that they are told to, by a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.began = 0.0
        self.observation = SimpleNamespace(
            deterministic=False,
            stochastic=False,
            objective="latency",
            baseline_seconds=1e-3,
            device_type="cpu",
            model=None,
        )

    def run(self, plan: Plan, **options: Any) -> Outcome:
        self.now += 50.0
        return Outcome(plan, timing=FASTER, setup_seconds=20.0, seconds=50.0)


def candidate(name: str, phase: Phase, setup: float, gain: float = 1.5, level: Level = "exact") -> Candidate:
    variant = Variant(name, predicted_gain=gain, setup_seconds=setup)
    return Candidate(variant, phase, "test", name, make=lambda: None, level=level)


class Applied:
    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    def close(self) -> None:
        pass


def outlined(
    budget: float, offered: list[Candidate], fate: Any, latency: float = 1e-3, fuel: int | None = None
) -> tuple[Any, Any]:
    """A search in which ``fate(names, patience)`` says how long each trial takes and how it ends."""

    class Told(Trials):
        def __init__(self) -> None:
            super().__init__()
            self.observation = SimpleNamespace(
                deterministic=False, stochastic=False, objective="latency", baseline_seconds=latency
            )
            self.log: list[Outcome] = []
            self.seen: list[tuple[str, float]] = []

        def run(self, plan: Plan, **options: Any) -> Outcome:
            self.seen.append((plan.key, self.now))
            seconds, rule, gain = fate(set(plan.names), options["against"])
            if seconds > options["seconds"]:
                self.now += options["seconds"]
                return Outcome(plan, rule="deadline", reason="stopped", seconds=options["seconds"])
            self.now += seconds
            timing = Timing(gain, 0.98 * gain, 1.02 * gain, 1.0, 1.0 / gain, 16)
            rule = "slower" if rule == "ok" and gain < 1.0 else rule
            setup = max(0.0, seconds - 1.0)
            return Outcome(
                plan,
                rule=rule,
                timing=timing,
                setup_seconds=setup,
                seconds=seconds,
                applied=Applied(plan),  # type: ignore[arg-type]
            )

    trials = Told()
    time = Budget(budget, clock=lambda: trials.now)
    search = Search(Ledger(trials, offered, time, fuel=fuel))  # type: ignore[arg-type]
    search._gate = lambda: None  # type: ignore[method-assign]
    return search.run(), trials
