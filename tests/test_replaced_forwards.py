"""`replace_forward` leaves a module as it found it."""

from __future__ import annotations

import torch

from kpt.specs import replace_forward


def test_the_class_s_forward_comes_back() -> None:
    model = torch.nn.Linear(3, 2)
    x, before = torch.randn(4, 3), set(vars(model))
    undo = replace_forward(model, lambda x: x * 2)
    assert torch.equal(model(x), x * 2)
    undo()
    assert set(vars(model)) == before and torch.equal(
        model(x), torch.nn.functional.linear(x, *model.parameters())
    )
    undo()
    assert "forward" not in vars(model)


def test_a_forward_of_the_instance_comes_back() -> None:
    model = torch.nn.Linear(3, 2)

    def own(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    model.forward = own  # type: ignore[method-assign]
    undo = replace_forward(model, lambda x: x * 2)
    inner = replace_forward(model, lambda x: x * 3)
    inner()
    assert torch.equal(model(torch.ones(1)), torch.tensor([2.0]))
    undo()
    assert vars(model)["forward"] is own
