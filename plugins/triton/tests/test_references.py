"""The references of the losses against PyTorch's own, where logits rule classes out. No kernel runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kpt_plugin_triton.references.losses import cross_entropy, linear_cross_entropy

TARGET = torch.tensor([1, -100, 3, 4, -100, 2])


def _z_loss(logits: torch.Tensor, reduction: str) -> torch.Tensor:
    rows = torch.logsumexp(logits[TARGET != -100], dim=-1).square()
    if reduction == "none":
        return torch.zeros(6, dtype=logits.dtype).index_put((TARGET != -100,), rows)
    return rows.sum() if reduction == "sum" else rows.mean()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_an_ignored_row_counts_nothing_whatever_its_logits(
    reduction: str, z_loss: float, whole_rows: bool
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    logits[:, 0] = float("-inf")
    if whole_rows:
        logits[TARGET == -100] = float("-inf")
    found = cross_entropy(logits, TARGET, reduction=reduction, z_loss=z_loss)
    expected = F.cross_entropy(logits, TARGET, reduction=reduction) + z_loss * _z_loss(logits, reduction)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_bias_that_rules_a_class_out(reduction: str, z_loss: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    bias[0] = float("-inf")
    found = linear_cross_entropy(hidden, weight, TARGET, bias, reduction=reduction, z_loss=z_loss)
    logits = F.linear(hidden, weight, bias)
    expected = F.cross_entropy(logits, TARGET, reduction=reduction) + z_loss * _z_loss(logits, reduction)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(expected.sum(), hidden)
    ):
        torch.testing.assert_close(one, other)
