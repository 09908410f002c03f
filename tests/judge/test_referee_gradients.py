"""The referee on gradients and on buffers, which are held to the same tolerances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kpt.judge.referee import judge_buffers, judge_gradients
from matmul_problem import CAST, EAGER, REFERENCE

RMS = float(REFERENCE.square().mean().sqrt())
GRADS = {"w": REFERENCE, "b": REFERENCE[0], "frozen": None}
EAGER_GRADS = {"w": EAGER, "b": EAGER[0], "frozen": None}


def gradients(**changed: Any) -> Any:
    return judge_gradients({**EAGER_GRADS, **changed}, GRADS, EAGER_GRADS, level="exact")


def test_every_gradient_is_judged() -> None:
    assert gradients()
    for wrong in (
        {"w": EAGER * 1.01},
        {"w": EAGER * math.nan},
        {"b": None},
        {"frozen": EAGER},
        {"w": EAGER[:3]},
        {"w": EAGER.bfloat16()},
        {"more": EAGER},
    ):
        verdict = gradients(**wrong)
        assert (verdict.passed, verdict.rule) == (False, "gradient"), wrong


def test_a_gradient_that_vanishes_analytically_is_rounding_noise() -> None:
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 1e-8
    wide = {"w": REFERENCE, "key.bias": torch.zeros(32, dtype=torch.float64)}
    eager = {"w": EAGER, "key.bias": noise}
    assert judge_gradients({"w": EAGER, "key.bias": noise.flip(0) * 3}, wide, eager, level="exact")
    assert not judge_gradients({"w": EAGER, "key.bias": noise + 1e-3}, wide, eager, level="exact")


def test_gradients_in_bf16_follow_the_cast_eagers() -> None:
    terms: dict[str, Any] = {"level": "production", "compute_dtype": "bfloat16", "cast_eager": {"w": CAST}}
    assert judge_gradients({"w": CAST}, {"w": REFERENCE}, {"w": EAGER}, **terms)
    assert judge_gradients({"w": EAGER * 1.03}, {"w": REFERENCE}, {"w": EAGER}, **terms).rule == "gradient"


def test_a_gradient_that_vanishes_is_rounding_noise_in_bf16_too_where_eagers_cast_has_as_much() -> None:
    """As large as it is for the key biases of BERT-base: 0.0007 of the root mean square of all gradients."""
    noise = 7e-4 * RMS * torch.randn(32, generator=torch.Generator().manual_seed(0))
    wide = {"w": REFERENCE, "key.bias": torch.zeros(32, dtype=torch.float64)}
    eager = {"w": EAGER, "key.bias": torch.zeros(32)}

    def judged(bias: torch.Tensor, own: torch.Tensor) -> Any:
        cast = {"w": CAST, "key.bias": own}
        terms: dict[str, Any] = {"level": "production", "compute_dtype": "bfloat16", "cast_eager": cast}
        return judge_gradients({"w": CAST, "key.bias": bias}, wide, eager, **terms)

    assert judged(noise.flip(0), noise)
    assert judged(3.0 * noise, noise).rule == "gradient"
    assert judged(noise, 0.01 * noise).rule == "gradient"
    assert judged(7.0 * noise, 7.0 * noise).rule == "gradient"
    unknown = torch.full((32,), math.nan)
    assert judged(noise, unknown).rule == "gradient", "of what eager's cast is nothing is known"


def test_a_small_gradient_that_is_wrong_is_no_rounding_noise_whatever_eagers_cast_has() -> None:
    small = 5e-3 * RMS * torch.randn(32, generator=torch.Generator().manual_seed(1))
    wide = {"w": REFERENCE, "small": small.double()}
    wrong = small + 3e-3 * RMS * torch.randn(32, generator=torch.Generator().manual_seed(2))
    verdict = judge_gradients(
        {"w": CAST, "small": wrong},
        wide,
        {"w": EAGER, "small": small},
        level="production",
        compute_dtype="bfloat16",
        cast_eager={"w": CAST, "small": wrong},
    )
    assert verdict.rule == "gradient"


@pytest.mark.parametrize(
    ("mine", "rule"),
    [
        (torch.tensor([1.0, 2.0]), "ok"),
        (torch.tensor([1.01, 2.0]), "value"),
        (torch.tensor([1.0, math.nan]), "nan"),
        (torch.tensor([1.0, 2.0, 3.0]), "global-state"),
        (torch.tensor([1, 2]), "global-state"),
    ],
)
def test_buffers_are_numbers_or_state(mine: torch.Tensor, rule: str) -> None:
    own = torch.tensor([1.0, 2.0])
    assert judge_buffers({"b": mine}, {"b": own.double()}, {"b": own}, level="exact").rule == rule
    count = torch.tensor(3)
    assert judge_buffers({"b": count + 1}, {"b": count}, {"b": count}, level="exact").rule == "global-state"
    assert judge_buffers({"b": count.clone()}, {"b": count}, {"b": count}, level="exact")


def test_buffers_have_the_tolerance_of_gradients() -> None:
    """A mean of what was computed in bfloat16 may be off by as much as eager's in bfloat16 is."""
    cast = {"b": CAST + 0.07 * (CAST - CAST.mean())}
    given = {"b": CAST + 0.071 * (CAST - CAST.mean())}, {"b": REFERENCE}, {"b": EAGER}
    terms: dict[str, Any] = {"level": "production", "compute_dtype": "bfloat16", "cast_eager": cast}
    assert judge_gradients(*given, **terms).passed and judge_buffers(*given, **terms).passed
    assert judge_buffers({"b": 1.3 * CAST}, *given[1:], **terms).rule == "value"
