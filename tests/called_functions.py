"""Attention whose forwards call functions by name, and the sites that are found in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kpt import ops
from recognised import Call


class Attention(nn.Module):
    """q, k and v from one input; ``turn`` and the attention are replaced by subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def parts(self, x: torch.Tensor, at: int = 1) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, 8)) for f in (self.q, self.k, self.v))
        table = torch.arange(x.shape[1])[:, None] * torch.linspace(1, 0.1, 4)[None]
        both = torch.cat((table, table), dim=-1)[None].expand(x.shape[0], -1, -1)
        return (q, k, v, both) if at == 2 else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), both)


X = torch.randn(2, 6, 16)


def sites(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, ops.Site]:
    found = ops.recognise(module, [Call(args, kwargs)])
    named = {site.callee: site for site in found.sites if site.kind != "module"}
    assert named, found.left_alone
    return named
