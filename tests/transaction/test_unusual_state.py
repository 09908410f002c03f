"""State that has no strides or that calls move on: sparse buffers, generators, iterators."""

from __future__ import annotations

import io

import pytest
import torch

import kpt
from fingerprints import fast_calls, optimized
from slow_models import DirectScale, Net, SlowScale, plugin


class Noisy(Net):
    """Draws from a generator of its own, and counts calls where ``counts``."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.calls = 0 if counts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls is not None:
            self.calls += 1
        return super().forward(x) + torch.rand(x.shape[0], 1, generator=self.generator)


@pytest.mark.parametrize("counts", [False, True])
def test_a_generator_that_a_model_holds_goes_on_where_it_was(counts: bool) -> None:
    model, x = Noisy(counts).eval(), torch.randn(32, 16)
    before = model.generator.get_state()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert torch.equal(model.generator.get_state(), before)
    assert not counts or "assigns calls" in kpt.report(model).reason


class Numbered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1000))
        self.unread = iter(range(1000))
        self.log = io.StringIO()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.flush()
        return super().forward(x) + next(self.numbers)


def test_what_calls_move_on_for_good_is_a_reason() -> None:
    model = Numbered().eval()
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "numbers is a range_iterator, which calls move on" in kpt.report(model).reason
    assert next(model.numbers) == 0


class Neighbours(torch.nn.Module):
    """Adds up neighbours by a sparse matrix that no memory would hold dense."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        nodes = 200_000
        edges = torch.randint(0, nodes, (2, 64), generator=torch.Generator().manual_seed(0))
        matrix = torch.sparse_coo_tensor(edges, torch.rand(64), (nodes, nodes)).coalesce()
        by_layout = {"coo": lambda: matrix, "csr": matrix.to_sparse_csr, "csc": matrix.to_sparse_csc}
        small = {"mkldnn": lambda: torch.rand(4, 4).to_mkldnn()}
        self.register_buffer("matrix", {**by_layout, **small}[layout](), persistent=False)
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + self.matrix.shape[0]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "mkldnn"])
@pytest.mark.filterwarnings("ignore:.*beta state.*")
def test_buffers_without_strides_are_compared_as_they_are(layout: str) -> None:
    model, x = Neighbours(layout).eval(), torch.randn(8, 16)
    matrix, expected = model.matrix, model(x)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        assert torch.equal(model(x), expected) and fast_calls(model) == 1
    assert kpt.restore(model).matrix is matrix


@pytest.mark.filterwarnings("ignore:.*beta state.*")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_buffer_that_calls_write_to_is_put_back(layout: str) -> None:
    class Ages(Neighbours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = self.matrix._values() if layout == "coo" else self.matrix.values()
            values.add_(1.0)
            return super().forward(x) * values.sum()

    model, x = Ages(layout).eval(), torch.randn(8, 16)
    before = model.matrix.clone()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert torch.equal(_values(model.matrix), _values(before)), kpt.report(model).reason


def _values(matrix: torch.Tensor) -> torch.Tensor:
    return matrix._values() if matrix.layout is torch.sparse_coo else matrix.values()
