"""The table of small models is what the tests that sample it take it for."""

from __future__ import annotations

import pytest
import torch

from model_families import FAMILIES, KINDS, sample

transformers = pytest.importorskip("transformers")


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return next(value for value in result.values() if isinstance(value, torch.Tensor))


def test_the_table_covers_every_kind_with_at_least_sixty_families() -> None:
    assert len(FAMILIES) >= 60
    assert {family.kind for family in FAMILIES.values()} == set(KINDS)


def test_every_named_class_exists() -> None:
    missing = [
        name
        for family in FAMILIES.values()
        for name in (family.config_class, family.model_class)
        if not hasattr(transformers, name)
    ]
    assert missing == []


def test_a_sample_depends_on_its_seed_only() -> None:
    names = [family.name for family in sample(12, "a")]
    assert names == [family.name for family in sample(12, "a")]
    assert names != [family.name for family in sample(12, "b")]
    assert len(set(names)) == 12
    assert {family.kind for family in sample(len(KINDS), 3)} == set(KINDS)


@pytest.mark.parametrize("family", sample(6, 0), ids=lambda family: family.name)
def test_models_are_reproducible_and_answer_to_their_inputs(family) -> None:
    state = torch.get_rng_state()
    model, again = family.build(), family.build()
    assert torch.equal(torch.get_rng_state(), state)
    first = outputs(model, family.example_inputs())
    assert torch.equal(first, outputs(again, family.example_inputs()))
    assert torch.isfinite(first).all()
    other = outputs(model, family.example_inputs(seed=1))
    assert (first - other).abs().max() > 1e-3 * first.abs().max()
