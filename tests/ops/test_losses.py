"""The reference of cross_entropy against PyTorch's own, where logits rule classes out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kpt import ops


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ruled_out", ["the first class of every row", "all that is ignored", "one class"])
def test_an_ignored_row_counts_nothing_whatever_its_logits(
    reduction: str, weighed: bool, smoothing: float, ruled_out: str
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([1, -100, 3, 4, -100, 2])
    if ruled_out == "the first class of every row":
        logits[:, 0] = float("-inf")
    elif ruled_out == "all that is ignored":
        logits[target == -100] = float("-inf")
    else:
        logits[target == -100, 0] = float("-inf")
    options = {
        "weight": torch.rand(5, dtype=torch.float64) + 0.1 if weighed else None,
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = (
        ops.reference("cross_entropy")(mine, target, **options),
        F.cross_entropy(theirs, target, **options),
    )
    torch.testing.assert_close(loss, expected)
    if not smoothing:
        assert loss.isfinite().all()
    (grad,) = torch.autograd.grad(loss.sum(), mine)
    (right,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(grad, right, equal_nan=True)
