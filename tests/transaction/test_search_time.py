"""What a search leaves of its budget."""

from __future__ import annotations

from typing import Any

import pytest

from kpt.judge.clock import Timing
from kpt.transaction.budget import Budget
from kpt.transaction.plan import Plan, Proposals
from kpt.transaction.search import Search
from kpt.transaction.trial import Outcome

FASTER = Timing(2.0, 1.9, 2.1, 1.0, 0.5, 16)


class _Trials:
    """Trials that take the time that they are told to, by a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, plan: Plan, **options: Any) -> Outcome:
        self.now += 50.0
        return Outcome(plan, timing=FASTER, setup_seconds=20.0, seconds=50.0)


@pytest.mark.parametrize(("budget", "left"), [(100.0, 5.0), (1000.0, 850.0)])
def test_the_commit_of_a_slow_model_keeps_the_time_that_it_will_need(budget: float, left: float) -> None:
    """It does again what took a trial 30 seconds, and for longer: 45 of 100 s, where a tenth is 10."""
    trials = _Trials()
    search = Search(trials, Proposals(), Budget(budget, clock=lambda: trials.now))  # type: ignore[arg-type]
    assert search._time_for(89.0)
    search._try(Plan())
    assert search._time_for(left - 0.1) and not search._time_for(left + 0.1)


def test_a_trial_that_was_wrong_says_nothing_of_the_commit() -> None:
    trials = _Trials()
    search = Search(trials, Proposals(), Budget(100.0, clock=lambda: trials.now))  # type: ignore[arg-type]
    search._keep_for_commit(Outcome(Plan(), rule="value", setup_seconds=1.0, seconds=90.0))
    assert search._time_for(89.0)
