"""An op that no catalogue of ours has, with its recogniser and a kernel: what a stranger's plugin brings."""

from __future__ import annotations

import torch
from torch import nn

from inline_models import detour
from kpt.ops import Hypothesis
from kpt.ops.regions import Region, base_name


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


class BrokenRecogniser:
    """Imports what is not there when it is asked."""

    def hypotheses(self, module, captured):
        raise ImportError("no such name")


def _first(node):
    """What went into the conversions before a node."""
    while base_name(node) in ("double", "float"):
        node = node.args[0]
    return node


class RegionRecogniser(Recogniser):
    """Looks for places in captured graphs, too."""

    marks = {"scaled_tanh": ("tanh",)}

    def regions(self, graph):
        for node in graph.nodes:
            inner, weight = node.args[:2] if base_name(node) == "mul" else (None, None)
            if isinstance(inner, torch.fx.Node) and base_name(inner) == "tanh":
                yield Region(
                    (node,), (_first(inner.args[0]),), {"weight": weight}, ops=frozenset({"scaled_tanh"})
                )


class InlineTanh(nn.Module):
    """Computes it in line, slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 4)
        self.gain = nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(torch.tanh(detour(y, 20)) * self.gain)


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


def attend(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention [batch, heads, sequence, head_dim] in the manner of model libraries, and slow."""
    rows = [torch.softmax(row @ k.transpose(-1, -2) * scaling, dim=-1) @ v for row in q.split(1, dim=-2)]
    return torch.cat(rows, dim=-2)


class AttendsByFunction(nn.Module):
    """Gives the function that computes its attention itself, as functions of an interface expect it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.scale = nn.Linear(width, 3 * width), 0.4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return attend(self, q, k, v, self.scale).transpose(1, 2).flatten(-2)
