"""Small models whose files are loaded, and what loading them says."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from kpt.modelfiles import ModelFileError, load_model


class Small(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Holder(nn.Module):
    """A model whose one child is called as DataParallel calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Small()


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def broken() -> nn.Module:
    raise SystemExit("needs arguments")


ARCH = "kpt_test_architectures"


def architectures() -> types.ModuleType:
    """The module that ``ARCH`` names: classes and functions, and what is neither."""
    module = types.ModuleType(ARCH)
    vars(module).update(Small=Small, Tied=Tied, Other=Other, broken=broken, number=7, text=lambda: "model")
    module.Holder = Holder  # type: ignore[attr-defined]
    module.Wide = lambda: Small(5)  # type: ignore[attr-defined]
    module.half = lambda: Small().bfloat16()  # type: ignore[attr-defined]
    return module


def code_of(path, **options) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, **options)
    assert caught.value.hint
    return caught.value.code


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
