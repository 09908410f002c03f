"""How far apart two tensors are, whatever their layout is and in pieces of whatever size."""

from __future__ import annotations

import math

import pytest
import torch

from kpt.judge import distances, pieces
from matmul_problem import CAST, EAGER, REFERENCE


def test_a_distance_is_the_same_where_everything_is_finite_and_where_one_element_is_not() -> None:
    values, reference = torch.randn(1000), torch.randn(1000, dtype=torch.float64)
    finite = distances.distance(values, reference, values)
    odd = torch.tensor([math.inf])
    with_odd = distances.distance(torch.cat([values, odd]), torch.cat([reference, odd.double()]))
    for name in ("error", "scale", "cosine", "norm_ratio", "misfits", "mismatches", "elements"):
        assert getattr(finite, name) == pytest.approx(getattr(with_odd, name), rel=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_the_distance_of_sparse_matrices_takes_no_dense_one(layout: torch.layout) -> None:
    def matrix(places: list[list[int]], values: list[float], size: int) -> torch.Tensor:
        found = torch.sparse_coo_tensor(places, values, (size, size), check_invariants=True)
        return found.to_sparse(layout=layout)

    def measured(size: int) -> distances.Distance:
        one = matrix([[0, 2, 3], [1, 0, 3]], [1.0, 2.0, 4.0], size)
        other = matrix([[0, 1, 3], [1, 1, 3]], [1.0, 3.0, math.nan], size)
        return distances.distance(one, other, one)

    small, large = measured(4), measured(200_000)
    assert large == small and small.elements == 3
    assert small.error == pytest.approx(math.sqrt((2.0**2 + 3.0**2) / 3))


def test_distances_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (
        distances.distance(CAST, REFERENCE, EAGER),
        distances.kl_divergence(CAST, REFERENCE),
        distances.top1_agreement(CAST, REFERENCE, EAGER),
        distances.rounding_error(REFERENCE, torch.bfloat16),
    )
    monkeypatch.setattr(pieces, "CHUNK", 37)
    parts = (
        distances.distance(CAST, REFERENCE, EAGER),
        distances.kl_divergence(CAST, REFERENCE),
        distances.top1_agreement(CAST, REFERENCE, EAGER),
        distances.rounding_error(REFERENCE, torch.bfloat16),
    )
    assert parts[0].error == pytest.approx(whole[0].error, rel=1e-12)
    assert parts[0].elements == whole[0].elements == REFERENCE.numel()
    assert parts[1:] == pytest.approx(whole[1:])
    expected = ((CAST.double() - REFERENCE) ** 2).mean().sqrt() / (REFERENCE**2).mean().sqrt()
    assert distances.relative_error(CAST, REFERENCE) == pytest.approx(float(expected))
    kl = torch.nn.functional.kl_div(
        CAST.double().log_softmax(-1), REFERENCE.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert whole[1] == pytest.approx(float(kl))
