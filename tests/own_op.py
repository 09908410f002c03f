"""An op that no catalogue of ours has, with its recogniser and a kernel: what a stranger's plugin brings."""

from __future__ import annotations

import torch
from torch import nn

from kpt.ops.sites import Hypothesis


def scaled_tanh(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``tanh(x) * weight``: the reference."""
    return torch.tanh(x) * weight


class Recogniser:
    """Takes every module with one vector and one input for a scaled_tanh, and lets the proof decide."""

    def hypotheses(self, module, captured):
        parameters = dict(module.named_parameters(recurse=False))
        names = list(captured.tensors())
        if len(parameters) == 1 and len(names) == 1:
            (weight,) = parameters
            yield Hypothesis("scaled_tanh", {"x": names[0], "weight": f"self.{weight}"})


class SlowScaledTanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):  # work that changes nothing
            y = torch.tanh(x) * self.gain
        return y


def model_loss(logits, labels, vocab_size, ignore_index=-100, **options):
    """A loss as language models call it: with the number of classes, which it needs for nothing else."""
    for _ in range(5):
        value = nn.functional.cross_entropy(
            logits.float().view(-1, vocab_size), labels.view(-1), ignore_index=ignore_index
        )
    return value


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 11)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model_loss(self.head(x), labels, vocab_size=11)
