"""The referee: each way of being wrong is rejected under its rule, and eager's own error is allowed."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kpt.judge import distances, outputs
from kpt.judge.calls import Call
from kpt.judge.handover import judge_inputs
from kpt.judge.referee import Spread, judge, judge_dropout, spread
from kpt.judge.verdict import RULES, rejected
from matmul_problem import CAST, EAGER, REFERENCE


def test_the_same_outputs_pass_and_every_level_is_known() -> None:
    for level in ("exact", "production", "aggressive"):
        assert judge(EAGER.clone(), REFERENCE, EAGER, level=level)
    with pytest.raises(ValueError, match="levels are exact, production, aggressive"):
        judge(EAGER, REFERENCE, EAGER, level="fast")
    with pytest.raises(ValueError, match="unknown rule"):
        rejected("speed", "")


@pytest.mark.parametrize("level", ["exact", "production", "aggressive"])
def test_a_plan_that_keeps_dtypes_is_judged_exactly_at_every_level(level: Any) -> None:
    for wrong in (EAGER * 1.01, EAGER + 1e-4, CAST):
        verdict = judge(wrong, REFERENCE, EAGER, level=level)
        assert (verdict.passed, verdict.rule) == (False, "value")
        assert verdict.figures["limit_ratio"] > 1.0


def test_a_candidate_closer_to_the_reference_than_eager_passes() -> None:
    assert judge(REFERENCE.float(), REFERENCE, EAGER, level="exact")


def test_eagers_own_error_is_the_measure() -> None:
    poor = EAGER * (1.0 + 1e-3)
    assert judge(EAGER * (1.0 - 1.5e-3), REFERENCE, poor, level="exact")
    assert not judge(EAGER * (1.0 - 1.5e-3), REFERENCE, EAGER, level="exact")


def test_a_model_in_bf16_is_judged_against_bf16() -> None:
    eager = REFERENCE.bfloat16()
    assert judge((REFERENCE * (1 + 1e-4)).bfloat16(), REFERENCE, eager, level="exact")
    assert judge((REFERENCE * 1.02).bfloat16(), REFERENCE, eager, level="exact").rule == "value"


def test_production_allows_the_cast_eagers_error_and_no_more() -> None:
    terms: dict[str, Any] = {"level": "production", "cast_eager": CAST, "compute_dtype": "bfloat16"}
    assert judge(CAST, REFERENCE, EAGER, **terms)
    assert judge(REFERENCE.float() + 1.4 * (CAST - REFERENCE.float()), REFERENCE, EAGER, **terms)
    verdict = judge(REFERENCE.float() + 3.0 * (CAST - REFERENCE.float()), REFERENCE, EAGER, **terms)
    assert verdict.rule == "value" and "eager in torch.bfloat16" in verdict.detail
    assert judge(EAGER * 1.02, REFERENCE, EAGER, **terms).rule == "value"


def test_production_without_a_cast_eager_is_bounded_by_relative_error() -> None:
    terms: dict[str, Any] = {"level": "production", "compute_dtype": torch.bfloat16}
    assert judge(EAGER * 1.04, REFERENCE, EAGER, **terms)
    assert judge(EAGER * 1.06, REFERENCE, EAGER, **terms).rule == "value"


def test_logits_are_judged_by_what_they_predict() -> None:
    noisy = EAGER * 0.01 + 1e-5 * torch.randn(EAGER.shape, generator=torch.Generator().manual_seed(1))
    reference, eager = REFERENCE * 0.01, EAGER * 0.01
    terms: dict[str, Any] = {"level": "production", "compute_dtype": "bfloat16"}
    assert judge(
        {"logits": noisy + 0.5}, {"logits": reference}, {"logits": eager}, **terms
    )  # softmax ignores shifts
    assert judge({"hidden": noisy + 0.5}, {"hidden": reference}, {"hidden": eager}, **terms).rule == "value"
    assert judge({"s": noisy + 0.5}, {"s": reference}, {"s": eager}, logits=("s",), **terms)
    verdict = judge({"logits": -eager}, {"logits": reference}, {"logits": eager}, **terms)
    assert verdict.rule == "value" and verdict.figures["top1"] < 0.1


def test_top1_counts_only_rows_that_eager_decides() -> None:
    reference = torch.tensor([[1.0, 1.0 + 1e-9, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    eager = torch.tensor([[1.0 + 1e-6, 1.0, 0.0], [3.0, 0.0, 0.0]])
    assert distances.top1_agreement(torch.tensor([[1.0, 0.0, 0.0], [3.0, 0, 0]]), reference, eager) == 1.0
    assert distances.top1_agreement(torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0]]), reference, eager) == 0.0


def test_aggressive_bounds_direction_norm_and_divergence() -> None:
    terms: dict[str, Any] = {"level": "aggressive", "compute_dtype": "int8"}
    noise = torch.randn(EAGER.shape, generator=torch.Generator().manual_seed(2)) * EAGER.std()
    assert judge(EAGER + 0.1 * noise, REFERENCE, EAGER, **terms)
    assert judge(EAGER + 0.3 * noise, REFERENCE, EAGER, **terms).rule == "value"
    assert judge(EAGER * 2.0, REFERENCE, EAGER, **terms).rule == "value"  # cosine 1, but twice as long
    verdict = judge({"logits": EAGER + 0.1 * noise}, {"logits": REFERENCE}, {"logits": EAGER}, **terms)
    assert verdict.rule == "value" and verdict.figures["kl"] > 0.05
    loss = torch.tensor(2.0)
    assert judge(loss * 1.01, loss.double(), loss, **terms)
    assert not judge(loss * 1.3, loss.double(), loss, **terms)


def test_nan_and_infinity_are_no_wildcards() -> None:
    wrong = EAGER.clone()
    wrong[3, 4] = math.nan
    for level in ("exact", "production", "aggressive"):
        assert judge(wrong, REFERENCE, EAGER, level=level, compute_dtype="bfloat16").rule == "nan"
    wrong[3, 4] = math.inf
    assert judge(wrong, REFERENCE, EAGER, level="exact").rule == "nan"


def test_infinities_of_the_reference_have_to_be_there() -> None:
    reference, eager = REFERENCE.clone(), EAGER.clone()
    reference[0], eager[0] = -math.inf, -math.inf
    assert judge(eager.clone(), reference, eager, level="exact")
    assert judge(EAGER.clone(), reference, eager, level="exact").rule == "value"
    opposite = eager.clone()
    opposite[0] = math.inf
    assert judge(opposite, reference, eager, level="exact").rule == "value"


def test_where_eager_itself_overflows_nothing_is_asked() -> None:
    eager = EAGER.clone()
    eager[0, 0] = math.inf
    assert judge(eager.clone(), REFERENCE, eager, level="exact")
    assert judge(EAGER.clone(), REFERENCE, eager, level="exact")


class Output(OrderedDict):  # type: ignore[type-arg]
    """Like a model library's output class."""


@dataclass
class Result:
    value: torch.Tensor
    extra: Any = None


@pytest.mark.parametrize(
    ("candidate", "eager", "rule"),
    [
        ((EAGER,), EAGER, "structure"),
        ([EAGER], (EAGER,), "structure"),
        ({"a": EAGER}, {"b": EAGER}, "structure"),
        ({"a": EAGER}, Output(a=EAGER), "structure"),
        ((EAGER, None), (EAGER, EAGER), "structure"),
        (Result(EAGER, EAGER.clone()), Result(EAGER), "structure"),
        (EAGER.to_sparse(), EAGER, "structure"),
        (EAGER[:-1], EAGER, "shape"),
        (EAGER.unsqueeze(0), EAGER, "shape"),
        (EAGER.double(), EAGER, "dtype"),
        (EAGER.bfloat16(), EAGER, "dtype"),
        (Result(EAGER, 3), Result(EAGER, 4), "value"),
        (Result(EAGER, "a"), Result(EAGER, "b"), "value"),
    ],
)
def test_outputs_have_eagers_structure_shapes_and_dtypes(candidate: Any, eager: Any, rule: str) -> None:
    assert judge(candidate, eager, eager, level="production", compute_dtype="bfloat16").rule == rule


def test_every_leaf_of_nested_outputs_is_judged() -> None:
    def nested(value: torch.Tensor) -> Any:
        return Output(a=EAGER, b=(Result(EAGER, 3), [EAGER, value]))

    assert judge(nested(EAGER.clone()), nested(EAGER), nested(EAGER), level="exact")
    verdict = judge(nested(EAGER * 1.01), nested(EAGER), nested(EAGER), level="exact")
    assert verdict.rule == "value" and "b[1][1]" in verdict.detail


def test_outputs_may_not_alias_where_eagers_do_not() -> None:
    pair = (EAGER, EAGER.clone())
    assert judge((EAGER, EAGER), pair, pair, level="exact").rule == "structure"
    same = (EAGER, EAGER)
    assert judge(pair, same, same, level="exact")  # a copy is safe
    both = torch.cat([EAGER, EAGER], -1)
    halves = both.chunk(2, -1)
    assert judge(tuple(halves), pair, pair, level="exact")  # interleaved, but no element is shared
    x = EAGER.clone()
    verdict = judge(x, EAGER, EAGER, level="exact", inputs=Call((x,)), eager_inputs=Call((x.clone(),)))
    assert verdict.rule == "structure" and "[0]" in verdict.detail


def test_integers_agree_where_the_choice_is_no_tie() -> None:
    reference = torch.arange(1000)
    eager = reference.clone()
    eager[:5] = 0  # eager itself loses ties here
    assert judge(reference.clone(), reference, eager, level="exact")
    wrong = eager.clone()
    wrong[20:25] = 0
    assert judge(wrong, reference, eager, level="exact").rule == "value"
    assert judge(wrong, reference, eager, level="production", compute_dtype="bfloat16")
    wrong[20:50] = 0
    assert not judge(wrong, reference, eager, level="production", compute_dtype="bfloat16")


def test_only_valid_positions_are_judged_under_a_mask() -> None:
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    reference = torch.randn(4, 6, 8, dtype=torch.float64)
    caches = torch.randn(4, 2, 6, 3, dtype=torch.float64)
    pooled = torch.randn(4, 8, dtype=torch.float64)
    wide = {"hidden": reference, "keys": caches, "pooled": pooled}
    eager = {name: value.float() for name, value in wide.items()}
    padded = {name: value.clone() for name, value in eager.items()}
    padded["hidden"][1, 3:] = 0.0
    padded["keys"][1, :, 3:] = 0.0
    verdict = judge(padded, wide, eager, level="exact", mask={"attention_mask": mask})
    assert verdict.passed and verdict.figures["whole_relative_error"] > 0.01
    assert not judge(padded, wide, eager, level="exact")
    padded["hidden"][1, 2] = 0.0
    assert judge(padded, wide, eager, level="exact", mask=mask, rule="mask").rule == "mask"
    eager["pooled"], padded["pooled"] = pooled.float(), pooled.float() * 1.01
    padded["hidden"] = eager["hidden"]
    assert not judge(padded, wide, eager, level="exact", mask=mask)


def test_an_encoder_and_a_decoder_have_their_own_masks() -> None:
    encoder, decoder = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    encoder[0, 2:], decoder[1, 1:] = False, False
    masks = {"attention_mask": encoder, "decoder_attention_mask": decoder}
    tensor = torch.ones(2, 4, 3)
    assert outputs.mask_for("logits", tensor, masks) is decoder
    assert outputs.mask_for("encoder_last_hidden_state", tensor, masks) is encoder
    assert outputs.mask_for("logits", torch.ones(2, 5, 3), masks) is None


def test_a_scalar_that_eager_hits_by_luck_may_be_off_by_rounding() -> None:
    loss = torch.tensor(2.5)
    assert judge(torch.tensor(2.5 * (1 + 2e-6)), loss.double(), loss, level="exact")
    assert not judge(torch.tensor(2.5 * 1.01), loss.double(), loss, level="exact")
    assert judge(
        torch.tensor(2.5 * (1 + 2**-8)).bfloat16(),
        torch.tensor(2.503, dtype=torch.float64),
        torch.tensor(2.5).bfloat16(),
        level="exact",
    )


def test_without_a_wider_reference_an_error_is_assumed() -> None:
    assert judge(EAGER * (1 + 1e-5), EAGER, EAGER, level="exact")
    assert not judge(EAGER * (1 + 1e-5), EAGER.double(), EAGER, level="exact")
    assert not judge(EAGER * (1 + 1e-4), EAGER, EAGER, level="exact")
    assert not judge(REFERENCE * (1 + 1e-5), REFERENCE, REFERENCE, level="exact")


def test_a_rejection_can_be_named_after_what_revealed_it() -> None:
    verdict = judge(EAGER * 1.01, REFERENCE, EAGER, level="exact").named("size", "at batch 3")
    assert verdict.rule == "size" and verdict.detail.startswith("at batch 3: ")
    assert judge(EAGER, REFERENCE, EAGER, level="exact").named("size").passed
    assert {"size", "stride", "mask", "gradient"} <= set(RULES)


def test_modified_inputs_are_found_bit_for_bit() -> None:
    x = torch.tensor([0.0, math.nan])
    before = Call((x,)).clone()
    assert judge_inputs(before, Call((x,)))
    x[0] = -0.0
    assert judge_inputs(before, Call((x,))).rule == "input-modified"


def over_seeds(rate: float, values: torch.Tensor = EAGER, seed: int = 0) -> Spread:
    generator = torch.Generator().manual_seed(1000 * seed + int(rate * 100))
    kept = [torch.rand(values.shape, generator=generator) > rate for _ in range(16)]
    return spread({"out": values * each / (1.0 - rate)} for each in kept)


def test_the_rate_of_dropout_is_judged_by_its_spread() -> None:
    still = spread([{"out": EAGER}] * 16)
    assert judge_dropout(over_seeds(0.1), over_seeds(0.11))
    assert judge_dropout(still, spread([{"out": EAGER}] * 8))
    for wrong in (over_seeds(0.3), still, over_seeds(0.01)):
        assert judge_dropout(wrong, over_seeds(0.1)).rule == "dropout"
    assert judge_dropout(over_seeds(0.1), still).rule == "dropout"


def test_chance_does_not_refuse_the_spread_of_a_single_number() -> None:
    """Over 8 seeds that of one normal number is off by a quarter more often than not."""

    def loss(seed: int, scale: float = 1.0) -> Spread:
        generator = torch.Generator().manual_seed(seed)
        return spread({"loss": scale * torch.randn((), generator=generator)} for _ in range(8))

    assert all(judge_dropout(loss(seed), loss(1000 + seed)) for seed in range(300))
    assert not judge_dropout(loss(0, 100.0), loss(1))
    assert not judge_dropout(loss(0), loss(1, 0.0)) and not judge_dropout(loss(0, 0.0), loss(1))


def test_the_spread_is_that_of_all_runs_together_and_passes_over_what_is_not_finite() -> None:
    runs = [torch.randn(5, 7) for _ in range(9)]
    found = spread({"out": run, "which": run.long()} for run in runs)
    expected = float(torch.stack(runs).double().var(dim=0).mean().sqrt())
    assert found.deviations == {"out": pytest.approx(expected, rel=1e-12)}
    assert found.elements == {"out": 35} and found.runs == 9
    masked = [{"out": torch.tensor([-math.inf, math.nan, 1.0])}] * 8
    assert spread(masked).deviations == {"out": 0.0}


def test_an_array_is_no_tensor_and_no_number_though_the_values_are_the_same() -> None:
    numpy = pytest.importorskip("numpy")
    array, number = EAGER.numpy(), numpy.float32(3.0)
    forms: list[Any] = [{"logits": EAGER}, {"logits": array}]
    numbers: list[Any] = [torch.tensor(3.0), number, numpy.array(3.0, dtype="float32"), 3.0]
    for group, wide in ((forms, {"logits": REFERENCE}), (numbers, torch.tensor(3.0, dtype=torch.float64))):
        for mine in group:
            for own in group:
                verdict = judge(mine, wide, own, level="exact")
                assert verdict.passed is (mine is own), (mine, own, verdict)
                assert verdict.passed or verdict.rule == "structure"
    subclass = array.view(type("Array", (numpy.ndarray,), {}))
    assert judge(subclass, REFERENCE, array, level="exact").rule == "structure"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nan_is_found_beside_integers_that_differ(order: tuple[int, int]) -> None:
    """Whoever decides of other choices in place of the tolerance has not decided of NaN."""
    choices, scores = torch.arange(6), torch.randn(6)
    eager = [(choices, scores)[each] for each in order]
    mine = [(choices.flip(0), torch.full((6,), math.nan))[each] for each in order]
    verdict = judge(
        mine, [each.double() if each.is_floating_point() else each for each in eager], eager, level="exact"
    )
    assert verdict.rule == "nan"
