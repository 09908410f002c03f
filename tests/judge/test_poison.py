"""Memory that was never written is NaN under poison, however it was allocated."""

from __future__ import annotations

import math

import torch

from kpt.judge.poison import PoisonMode, poison, poisoned, poisoned_everywhere, poisoned_memory


def test_every_way_to_allocate_is_poisoned() -> None:
    x = torch.ones(3, 4)
    with poisoned():
        made = [
            torch.empty(3),
            torch.empty_like(x),
            torch.empty_strided((2, 2), (1, 2)),
            torch.empty_permuted((2, 2), (1, 0)),
            x.new_empty(2),
            x.new_empty_strided((2,), (1,)),
            torch.empty(3, dtype=torch.bfloat16),
            torch.empty(3, dtype=torch.complex64),
        ]
        numbers = torch.empty(3, dtype=torch.int32)
        grown = torch.ones(2).resize_(4)
        written = torch.zeros(3)
    assert all(bool(torch.isnan(tensor).all()) for tensor in made)
    assert bool((numbers == torch.iinfo(torch.int32).max).all())
    assert grown[:2].tolist() == [1.0, 1.0] and bool(torch.isnan(grown[2:]).all())
    assert not written.any()


def test_another_fill_tells_holes_from_nan() -> None:
    with PoisonMode(0.0):
        assert not torch.empty(100).any()
        assert not torch.empty(100, dtype=torch.int64).any()


def test_memory_inside_custom_operators_is_poisoned_everywhere() -> None:
    @torch.library.custom_op("kpt_test::half_written", mutates_args=())
    def half_written(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out[: x.shape[0] // 2] = x[: x.shape[0] // 2]
        return out

    x = torch.randn(10, 3)
    with poisoned_everywhere():
        out = half_written(x)
    assert torch.equal(out[:5], x[:5]) and bool(torch.isnan(out[5:]).all())
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison_is_undone_after_a_failure() -> None:
    try:
        with poisoned_everywhere(), poisoned():
            raise ValueError
    except ValueError:
        pass
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_flow_through_poisoned_code() -> None:
    x = torch.randn(4, requires_grad=True)
    with poisoned():
        x.sigmoid().sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_free_memory_is_poisoned_for_any_tensor() -> None:
    poisoned_memory(
        [torch.ones(1000), torch.ones(3, dtype=torch.int8), torch.empty(0), torch.ones(2, device="meta")]
    )
    assert math.isnan(float(poison(torch.zeros(2))[1]))
    assert bool(poison(torch.zeros(2, dtype=torch.bool)).all())
