"""A plan in lower precision that misses its tolerance narrowly on one call is judged on others like it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kpt import profiles
from kpt.judge import referee
from kpt.judge.calls import as_calls
from kpt.judge.draws import InputSpec
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.plugins import registry
from kpt.transaction.baseline import Baseline
from kpt.transaction.budget import Budget
from kpt.transaction.fresh_calls import Draw, FreshCalls
from kpt.transaction.judgement import Judgement
from kpt.transaction.observe import observe

NEAR = rejected("size", "near", {"relative_error": 0.055}, excess=1.1)
FAR = rejected("size", "far", {"relative_error": 0.5}, excess=10.0)


class Drawn(FreshCalls):
    """Remembers what it is asked for, and draws no call."""

    def __init__(self) -> None:
        self.drawn: list[tuple] = []
        self.moved: set[str] = set()

    def _drawn(self, rule, label, sizes, padding):
        self.drawn.append((rule, label, sizes, padding))
        expected = SimpleNamespace(eager=SimpleNamespace(output=torch.zeros(1)))
        return Draw(expected, rule, label, len(self.drawn), sizes, padding)


class Scripted(Judgement):
    """Answers the draws that it is asked for with ``verdicts``, one after another."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.calls = Drawn()
        self._moved_by_plan: set[str] = set()

    @property
    def drawn(self) -> list[tuple]:
        return self.calls.drawn

    def _one(self, applied, draw, given=None):
        return self.verdicts.pop(0), torch.zeros(1)

    def _leaves_unwritten(self, applied, draw):
        return False

    def _elsewhere(self, applied, draw):
        return passed()


def judged(*verdicts: Verdict, dtype: str | None = "bfloat16") -> tuple[Verdict, Scripted]:
    judgement = Scripted(*verdicts)
    draw = judgement.calls._drawn("size", "rows=17", {"rows": 17}, True)
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype=dtype))
    return judgement.judge(applied, [draw]), judgement


def test_two_more_calls_of_the_same_kind_have_to_hold():
    verdict, judgement = judged(NEAR, passed(), passed())
    assert verdict.passed and not judgement.verdicts
    assert judgement.drawn == [("size", "rows=17", {"rows": 17}, True)] * 3


def test_what_comes_after_is_judged_on_the_calls_that_held():
    judgement = Scripted(NEAR, passed(), passed(), passed())
    judgement.refilled = []
    judgement._refilled = lambda applied, *draws: judgement.refilled.extend(d.seed for d in draws) or passed()
    draws = [judgement.calls._drawn("value", "like the example", None, False) for _ in range(2)]
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="bfloat16"))
    assert judgement.judge(applied, draws).passed
    assert judgement.refilled == [4, 2]


def test_the_worst_figures_of_all_calls_are_told():
    closest = passed(figures={"relative_error": 0.01, "cosine": 0.999})
    worst = passed(figures={"relative_error": 0.02, "cosine": 0.99})
    verdict, _ = judged(NEAR, worst, closest)
    assert verdict.passed and verdict.figures == {"relative_error": 0.055, "cosine": 0.99}


@pytest.mark.parametrize("others", [(NEAR,), (passed(), NEAR), (FAR,)])
def test_what_is_wrong_there_too_is_rejected(others):
    verdict, _ = judged(NEAR, *others)
    assert not verdict.passed and verdict.rule == "size" and verdict.detail.startswith("rows=17")


def test_what_misses_by_far_is_rejected_at_once():
    verdict, judgement = judged(FAR)
    assert not verdict.passed and len(judgement.drawn) == 1


def test_plans_that_keep_dtypes_have_no_second_chance():
    verdict, judgement = judged(NEAR, dtype=None)
    assert not verdict.passed and len(judgement.drawn) == 1


@pytest.mark.parametrize(("level", "dtype"), [("production", "bfloat16"), ("aggressive", "int8")])
@pytest.mark.parametrize(("error", "near"), [(1.2, True), (3.0, False)])
def test_rejections_say_how_many_times_the_allowed_error_they_have(level, dtype, error, near):
    torch.manual_seed(0)
    reference = torch.randn(64, 64, dtype=torch.float64)
    bound = {"production": 0.05, "aggressive": 0.1414}[level]
    noise = torch.randn(64, 64, dtype=torch.float64)
    wrong = (reference + error * bound * noise / noise.norm() * reference.norm()).float()
    verdict = referee.judge(wrong, reference, reference.float(), level=level, compute_dtype=dtype)
    assert not verdict.passed and (verdict.excess <= 1.5) is near
    assert verdict.excess == pytest.approx(error, rel=0.05)


def test_the_worst_output_says_how_far_off_a_call_is():
    reference = torch.ones(64, dtype=torch.float64)
    near, lost = (reference * 1.06).float(), torch.full((64,), torch.nan)
    eager = [reference.float(), reference.float()]
    for candidate in ([near, lost], [near, (reference * 2.0).float()]):
        verdict = referee.judge(
            candidate, [reference] * 2, eager, level="production", compute_dtype="bfloat16"
        )
        assert not verdict.passed and verdict.excess > 10.0


def test_who_misses_both_bounds_is_as_far_off_as_the_worse_one_says():
    torch.manual_seed(0)
    reference, noise = torch.randn(2, 64, 64, dtype=torch.float64)
    cast, wrong = ((reference + share * noise).float() for share in (0.4, 0.8))  # bf16 eager is no better
    verdict = referee.judge(
        wrong, reference, reference.float(), level="production", cast_eager=cast, compute_dtype="bfloat16"
    )
    assert not verdict.passed and verdict.excess > 10.0


class Weighted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.weight


def test_a_near_miss_excuses_no_lost_gradient():
    calls = as_calls(torch.randn(4, 64))
    budget = Budget(60.0)
    observation, plain = observe(
        Weighted(),
        calls,
        InputSpec.from_calls(calls, None, Weighted().forward),
        level="production",
        objective="latency",
        hardware=profiles.hardware("cpu", measure=False),
        registry=registry([]),
        deadline=budget,
    )
    judgement = Judgement(observation, Baseline(observation, plain, seed=0), budget)
    draw = judgement.calls.draws(touches_mask=False, thorough=False)[0]
    plan = SimpleNamespace(level="production", compute_dtype="bfloat16", touches_mask=False)
    right = plain.forward
    near = SimpleNamespace(plan=plan, forward=lambda x: right(x) - 0.0037 * right(x).detach())
    lost = SimpleNamespace(plan=plan, forward=lambda x: near.forward(x).detach())
    assert judgement._may_be_chance(near, judgement._one(near, draw)[0])
    verdict, _ = judgement._one(lost, draw)
    assert verdict.rule == "gradient" and not judgement._may_be_chance(lost, verdict)
