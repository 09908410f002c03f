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
from kpt.transaction.nearness import Others
from kpt.transaction.observe import observe

NEAR = rejected("size", "near", {"relative_error": 0.055}, excess=1.1)
FAR = rejected("size", "far", {"relative_error": 0.5}, excess=10.0)
CLOSE = passed(figures={"relative_error": 0.048}, excess=0.96)


class Drawn(FreshCalls):
    """Remembers what it is asked for, and draws no call."""

    def __init__(self) -> None:
        self.drawn: list[tuple] = []
        self.moved: set[str] = set()

    def _drawn(self, rule, label, sizes, padding, *, again=False):
        self.drawn.append((rule, label, sizes, padding))
        expected = SimpleNamespace(eager=SimpleNamespace(output=torch.zeros(1)))
        return Draw(expected, rule, label, len(self.drawn), sizes, padding)


class Scripted(Judgement):
    """Answers the draws that it is asked for with ``verdicts``, one after another."""

    metric = False

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = list(verdicts)
        self.calls = Drawn()
        self.observation = SimpleNamespace(training=False)
        self.overruled = lambda rule: self.metric and rule in ("value", "size")
        self.others = Others(self.calls, Budget(60.0), lambda rule: self.overruled(rule), self._one)
        self._moved_by_plan: set[str] = set()

    @property
    def drawn(self) -> list[tuple]:
        return self.calls.drawn

    def _one(self, applied, draw, given=None):
        self.budget_spent()
        return self.verdicts.pop(0), torch.zeros(1)

    def budget_spent(self):
        """What each call takes."""

    def _leaves_unwritten(self, applied, draw):
        return False

    def _elsewhere(self, applied, draw):
        return passed()


def judged(*verdicts: Verdict, dtype: str | None = "bfloat16") -> tuple[Verdict, Scripted]:
    judgement = Scripted(*verdicts)
    draw = judgement.calls._drawn("size", "rows=17", {"rows": 17}, True)
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype=dtype, level="production"))
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
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="bfloat16", level="production"))
    assert judgement.judge(applied, draws).passed
    assert judgement.refilled == [4, 2]


def test_the_worst_figures_of_all_calls_are_told():
    closest = passed(figures={"relative_error": 0.01, "cosine": 0.999})
    worst = passed(figures={"relative_error": 0.02, "cosine": 0.99})
    verdict, _ = judged(NEAR, worst, closest)
    assert verdict.passed and verdict.figures == {"relative_error": 0.055, "cosine": 0.99}


@pytest.mark.parametrize("first", [NEAR, CLOSE])
def test_what_is_as_near_to_its_limit_on_a_second_call_is_beyond_it_on_some(first):
    for others in ((CLOSE,), (passed(), CLOSE), (passed(), NEAR)):
        verdict, judgement = judged(first, *others)
        assert not verdict.passed and verdict.rule == "size" and not judgement.verdicts
        assert "96% of what is allowed" in verdict.detail or others[-1] is NEAR
        assert verdict.figures["relative_error"] >= 0.048


def test_what_meets_its_limit_narrowly_once_is_accepted_where_two_others_keep_clear_of_it():
    verdict, judgement = judged(CLOSE, passed(), passed())
    assert verdict.passed and not judgement.verdicts and len(judgement.drawn) == 3


@pytest.mark.parametrize("taken", [0, 1])
def test_what_was_met_stands_where_eager_takes_no_other_call(taken):
    judgement = Scripted(CLOSE, *[passed()] * taken)
    draw = judgement.calls._drawn("size", "rows=17", {"rows": 17}, True)
    others = [judgement.calls._drawn("size", "rows=17", {"rows": 17}, True)] * taken
    judgement.calls._drawn = lambda *kind, **options: others.pop() if others else None
    elsewhere = []
    judgement._elsewhere = lambda applied, judged: elsewhere.append(judged) or passed()
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="bfloat16", level="production"))
    assert judgement.judge(applied, [draw]).passed and not judgement.verdicts
    assert elsewhere == [draw]  # and its own output goes with it


def test_of_other_calls_eager_may_refuse_any():
    """A first one of the examples' kind has to run."""
    calls = as_calls(torch.randn(4, 64))
    observation, baseline, _ = observed(Weighted(), calls)
    fresh = FreshCalls(observation, baseline)
    (draw, *_) = fresh.draws(touches_mask=False, thorough=False)

    def refuses(*args, **options):
        raise IndexError("out of range")

    baseline.expected = refuses
    assert fresh.like(draw) is None
    with pytest.raises(IndexError):
        fresh.draws(touches_mask=False, thorough=False)


def scored(positions: int, excess: float = 0.1) -> Verdict:
    return passed(figures={"scored_positions": positions}, excess=excess)


@pytest.mark.parametrize(("positions", "calls"), [(600, 3), (260, 4), (32, 25)])
def test_what_is_right_by_its_scores_alone_is_judged_on_many_positions(positions, calls):
    """Of 32, of which one in a thousand is far off, most often none is."""
    verdict, judgement = judged(*[scored(positions)] * calls)
    assert verdict.passed and not judgement.verdicts and len(judgement.drawn) == calls
    verdict, judgement = judged(*[scored(positions)] * (calls - 1), NEAR)
    assert not verdict.passed and not judgement.verdicts
    verdict, _ = judged(*[scored(positions)] * (calls - 1), scored(positions, 0.95))
    assert "95% of what is allowed" in verdict.detail
    # Those of which the error alone says enough count as well.
    verdict, judgement = judged(scored(positions), *[passed()] * (calls - 1))
    assert verdict.passed and not judgement.verdicts


def test_the_positions_of_all_draws_count_and_so_do_their_calls():
    judgement = Scripted(scored(300), *[passed()] * 3, scored(300), *[passed()] * 2)
    draws = [judgement.calls._drawn("size", f"rows={n}", {"rows": n}, True) for n in (3, 5)]
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="bfloat16", level="production"))
    judgement._refilled = lambda *_: passed()
    assert judgement.judge(applied, draws).passed
    # Three beside the first make 1200; the second needs none for that, and has two all the same.
    labels = [label for _, label, *_ in judgement.drawn]
    assert labels == ["rows=3", "rows=5"] + ["rows=3"] * 3 + ["rows=5"] * 2
    judgement.verdicts = [scored(8)] * 60
    assert judgement.judge(applied, draws).passed
    assert len(judgement.verdicts) == 60 - 25 - 3


def test_more_calls_than_two_take_no_more_than_a_tenth_of_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kpt.transaction.nearness.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def like(self, draw):
        now[0] += 2.0  # of eager and of the reference
        return self._drawn(draw.rule, draw.label, draw.sizes, draw.padding)

    def spent(self):
        now[0] += 0.5

    monkeypatch.setattr(Drawn, "like", like, raising=False)
    monkeypatch.setattr(Scripted, "budget_spent", spent)
    verdict, judgement = judged(*[scored(8)] * 4)
    assert verdict.passed and not judgement.verdicts  # 7.5 of 60 s are more than a tenth


def test_the_exact_level_knows_no_near_misses():
    judgement = Scripted(NEAR)
    draw = judgement.calls._drawn("size", "rows=17", {"rows": 17}, True)
    applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="float32", level="exact"))
    assert not judgement.judge(applied, [draw]).passed and len(judgement.drawn) == 1
    reference = torch.ones(64, dtype=torch.float64)
    verdict = referee.judge((reference * 1.01).float(), reference, reference.float(), level="exact")
    assert not verdict.passed and 10.0 < verdict.excess < float("inf")


def test_where_a_metric_decides_nothing_is_asked_of_tolerances_and_all_else_is():
    fine = passed()

    def judge(*verdicts, refilled=fine, elsewhere=fine):
        judgement = Scripted(*verdicts)
        judgement.metric = True
        judgement._refilled = lambda *_: refilled
        judgement._elsewhere = lambda *_: elsewhere
        draws = [judgement.calls._drawn("size", "rows=17", {"rows": 17}, True) for _ in range(2)]
        applied = SimpleNamespace(plan=SimpleNamespace(compute_dtype="bfloat16", level="production"))
        verdict = judgement.judge(applied, draws)
        assert len(judgement.drawn) == 2
        return verdict

    assert judge(CLOSE, CLOSE).passed
    missed = judge(NEAR, FAR)
    assert not missed.passed and missed.rule == "size" and missed.excess == 10.0
    assert missed.figures["relative_error"] == 0.5
    assert judge(FAR, rejected("nan", "none there")).rule == "nan"
    assert judge(NEAR, FAR, refilled=FAR).rule == "size"
    further = rejected("size", "the answer of another call", excess=50.0)
    assert judge(NEAR, FAR, refilled=further).rule == "replay"
    assert judge(FAR, NEAR, refilled=FAR).rule == "replay"  # the second call had missed by less
    assert judge(passed(), FAR, elsewhere=FAR).rule == "size"  # of the first call, which missed nothing
    assert judge(passed(), FAR, elsewhere=FAR).detail.startswith("for inputs at odd addresses")
    # Of what has no size only the same is excused.
    other, same = rejected("size", "the answer is 3"), rejected("size", "the answer is 2")
    assert judge(same, same, refilled=same).detail == "rows=17: the answer is 2"
    assert judge(same, same, refilled=other).rule == "replay"
    stale = rejected("size", "ids agree in 5%", {"agreement": 0.05})
    assert judge(NEAR, NEAR, refilled=stale).rule == "replay"
    assert judge(passed(), passed(), refilled=rejected("size", "", {"agreement": 1.0})).rule == "replay"
    assert judge(FAR, NEAR, elsewhere=rejected("nan", "none there")).rule == "nan"


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


def test_plans_that_keep_dtypes_may_be_as_near_to_eager_as_they_like():
    verdict, judgement = judged(CLOSE, dtype=None)
    assert verdict.passed and len(judgement.drawn) == 1


def _off(reference: torch.Tensor, by: float) -> torch.Tensor:
    noise = torch.randn_like(reference)
    return (reference + by * noise / noise.norm() * reference.norm()).float()


@pytest.mark.parametrize(("level", "dtype"), [("production", "bfloat16"), ("aggressive", "int8")])
@pytest.mark.parametrize("share", [0.1, 0.95])
def test_acceptances_say_which_share_of_the_allowed_error_they_have(level, dtype, share):
    torch.manual_seed(0)
    reference = torch.randn(64, 64, dtype=torch.float64)
    bound = {"production": 0.05, "aggressive": 0.1414}[level]
    candidates = [_off(reference, by) for by in (0.001, share * bound)]
    verdict = referee.judge(
        candidates, [reference] * 2, [reference.float()] * 2, level=level, compute_dtype=dtype
    )
    assert verdict.passed
    # A cosine falls with the square of the error, and the smaller share will do.
    assert verdict.excess == pytest.approx(share if level == "production" else share**2, rel=0.05)


@pytest.mark.parametrize(("lead", "share"), [(4.0, 0.1), (0.0, 0.96)])
def test_logits_are_as_far_from_their_limit_as_the_kinder_of_its_two_forms_says(lead, share):
    """A small divergence will do, where the highest of them is the same."""
    torch.manual_seed(0)
    reference = torch.randn(256, 16, dtype=torch.float64)
    reference[:, 0] += lead
    eager, wide = {"logits": reference.float()}, {"logits": reference}
    terms = {"level": "production", "compute_dtype": "bfloat16"}
    verdict = referee.judge({"logits": _off(reference, 0.048)}, wide, eager, **terms)
    assert verdict.passed and verdict.figures["kl"] < 0.002
    assert verdict.excess == pytest.approx(share, rel=0.3)
    assert "kl" not in referee.judge(eager, wide, eager, **terms).figures  # far from it, nobody asks


@pytest.mark.parametrize("scale", [1.02, 1.3, 2.0])
def test_who_misses_narrowly_by_scores_has_to_hold_on_as_many_calls_as_who_meets_them(scale):
    """Of 8 positions, whose error is far beyond what is allowed, and whose divergence decides."""
    torch.manual_seed(0)
    reference = torch.randn(8, 16, dtype=torch.float64)
    reference[:, 0] += 8.0
    terms = {"level": "production", "compute_dtype": "bfloat16", "rule": "size"}
    eager, wide = {"logits": reference.float()}, {"logits": reference}
    off = torch.zeros_like(reference)
    off[:, 0] = -1.0
    for by in torch.linspace(0.1, 4.0, 400):
        found = referee.judge({"logits": (reference + by * off).float()}, wide, eager, **terms)
        if found.figures.get("kl", 0.0) >= 0.01 * scale:
            break
    assert not found.passed and found.figures["scored_positions"] == 8
    assert found.excess == pytest.approx(found.figures["kl"] / 0.01)
    verdict, judgement = judged(found, *[passed()] * 24)
    assert verdict.passed is (scale < 1.5)
    assert len(judgement.drawn) == (25 if scale < 1.5 else 1)


def test_gradients_near_their_limit_may_be_as_near_on_others():
    torch.manual_seed(0)
    reference = torch.randn(64, 64, dtype=torch.float64)
    verdict = referee.judge_gradients(
        {"w": _off(reference, 0.048)},
        {"w": reference},
        {"w": reference.float()},
        level="production",
        compute_dtype="bfloat16",
    )
    assert verdict.passed and verdict.excess == 0.0


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


def observed(model, calls):
    budget = Budget(60.0)
    observation, plain = observe(
        model,
        calls,
        InputSpec.from_calls(calls, None, model.forward),
        level="production",
        objective="latency",
        hardware=profiles.hardware("cpu", measure=False),
        registry=registry([]),
        deadline=budget,
    )
    return observation, Baseline(observation, plain, seed=0), budget


def test_a_near_miss_excuses_no_lost_gradient():
    observation, baseline, budget = observed(Weighted(), as_calls(torch.randn(4, 64)))
    plain = baseline.plain
    judgement = Judgement(observation, baseline, budget)
    draw = judgement.calls.draws(touches_mask=False, thorough=False)[0]
    plan = SimpleNamespace(level="production", compute_dtype="bfloat16", touches_mask=False)
    right = plain.forward
    near = SimpleNamespace(plan=plan, forward=lambda x: right(x) - 0.0037 * right(x).detach())
    lost = SimpleNamespace(plan=plan, forward=lambda x: near.forward(x).detach())
    assert judgement.others.wanted(near, judgement._one(near, draw)[0])
    verdict, _ = judgement._one(lost, draw)
    assert verdict.rule == "gradient" and not judgement.others.wanted(lost, verdict)


class Scaled(Weighted):
    def forward(self, x, scale):
        return super().forward(x) * scale


def test_calls_are_drawn_like_examples_by_which_something_can_be_judged():
    """In one without rows whatever is wrong is right, and one in thirty such runs took what was wrong."""
    calls = as_calls([(torch.randn(rows, 64), torch.ones(1)) for rows in (4, 0, 4)])
    observation, baseline, _ = observed(Scaled(), calls)
    assert list(observation.spec.examples_with_empty_tensors()) == [1]
    fresh = FreshCalls(observation, baseline)
    drawn = [draw for _ in range(8) for draw in fresh.draws(touches_mask=False, thorough=True)]
    assert {draw.expected.eager.output.shape[0] for draw in drawn} == {4}
    assert fresh.like(drawn[0]).expected.eager.output.shape[0] == 4
