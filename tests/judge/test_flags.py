"""Integers that are all 0 or all 1 in the examples may be flags or kinds: they can be drawn otherwise."""

from __future__ import annotations

import pytest
import torch

from kpt.judge.calls import Call
from kpt.judge.draws import InputSpec


def spec_of(name: str, given: torch.Tensor) -> InputSpec:
    ids = torch.tensor([[5, 7, 9, 3], [5, 8, 2, 3]])
    return InputSpec.from_calls([Call((), {"ids": ids, name: given})])


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("name", ["valid", "token_type_ids", "segment_ids"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_they_are_mixed_where_that_is_asked_for(name: str, value: int, dtype: torch.dtype) -> None:
    given = torch.full((2, 4), value, dtype=dtype)
    spec = spec_of(name, given)
    assert spec.has_constant_integers
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(spec.draw(generator).kwargs[name], given)
        for keep in (False, True):
            call = spec.draw(generator, mix_integers=True, keep_integers=keep)
            drawn = call.kwargs[name]
            assert drawn.dtype == dtype and set(drawn.unique().tolist()) == {0, 1}
            assert bool((drawn == value).any(-1).all())  # no row is without
        assert torch.equal(call.kwargs["ids"][:, 0], torch.tensor([5, 5]))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("valid", torch.full((2, 4), 2)),
        ("valid", torch.ones(1, dtype=torch.int64)),
        ("valid", torch.tensor(1)),
        ("valid", torch.tensor([0, 1, 1])),
        ("position_ids", torch.zeros(2, 4, dtype=torch.int64)),
        ("lengths", torch.ones(2, dtype=torch.int64)),
    ],
)
def test_all_others_stay_as_they_are(name: str, given: torch.Tensor) -> None:
    spec = spec_of(name, given)
    assert not spec.has_constant_integers
    generator = torch.Generator().manual_seed(0)
    drawn = spec.draw(generator, mix_integers=True).kwargs[name]
    assert set(drawn.reshape(-1).tolist()) <= set(given.reshape(-1).tolist())
