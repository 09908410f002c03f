"""Modules in their usual spellings, and what is found in a module or said of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def recognised(module: nn.Module, *inputs: Any, **options: Any) -> ops.Recognition:
    return ops.recognise(module, [Call(inputs)], **options)


def only_site(module: nn.Module, *inputs: Any) -> ops.Site:
    found = recognised(module, *inputs)
    whole = [site for site in found.sites if site.path == "" and site.kind == "module"]
    assert len(whole) == 1, (found.sites, found.left_alone)
    return whole[0]


def reason(module: nn.Module, *inputs: Any, path: str = "") -> str:
    found = recognised(module, *inputs)
    assert not [site for site in found.sites if site.path == path and site.kind == "module"], found.sites
    reasons = [text for where, text in found.left_alone if where == path]
    assert reasons, found
    return reasons[0]


class RMSNorm(nn.Module):
    """The usual spelling; subclasses change one thing each."""

    def __init__(self, size: int = 12, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype)


class PlusOne(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        out = wide / (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        return (out * (1.0 + self.weight.float())).type_as(hidden_states)


class MLP(nn.Module):
    def __init__(self, activation: Any = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.one = nn.Linear(12, 20, bias=bias)
        self.two = nn.Linear(12, 20, bias=bias)
        self.three = nn.Linear(20, 12, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.activation(self.one(x)) * self.two(x))


X = torch.randn(2, 5, 12)
