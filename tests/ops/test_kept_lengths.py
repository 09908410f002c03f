"""Lengths that a proof may not shorten: code reads such a number, in this way or that."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops
from recognised import Call


class Attends(nn.Module):
    """Attention over a sequence that may be as long as the longest one that the config names."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.config = types.SimpleNamespace(longest=96, heads=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.project(x).view(1, x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


class Cuts(Attends):
    """The same, and its code knows how long the longest is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.project(x[:, : self.config.longest]).view(1, x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


def shortened(config: Any, x: torch.Tensor) -> torch.Tensor:
    return x[:, : config.longest]


class Shortener:
    def __init__(self, config: Any) -> None:
        self.longest = config.longest

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.longest]

    @staticmethod
    def cut(config: Any, x: torch.Tensor) -> torch.Tensor:
        return shortened(config, x)


class OwnSettings:
    def __init__(self) -> None:
        self.longest, self.heads = 96, 2

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.longest]


HELPERS = types.ModuleType("helpers")
HELPERS.inner = types.ModuleType("helpers.inner")  # type: ignore[attr-defined]
HELPERS.inner.shortened, HELPERS.Shortener = shortened, Shortener  # type: ignore[attr-defined]
SHORTENERS = {"first": shortened}


class CutsElsewhere(Attends):
    """Its own code does not name the longest: what it calls does, in this way or that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.cut(x))


class CutsInAModule(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.inner.shortened(self.config, x)


class CutsByAStaticMethod(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.Shortener.cut(self.config, x)


class CutsByAnObject(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.Shortener(self.config)(x)


class CutsByATable(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return SHORTENERS["first"](self.config, x)


class CutsByAFunctionItHolds(CutsElsewhere):
    def __init__(self) -> None:
        super().__init__()
        self.cut = functools.partial(shortened, self.config)


class CutsByItsConfig(CutsElsewhere):
    def __init__(self) -> None:
        super().__init__()
        self.config = OwnSettings()  # type: ignore[assignment]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return self.config.cut(x)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def around(self: Any, x: torch.Tensor) -> Any:
        return function(self, x)

    return around


class CutsUnderADecorator(CutsElsewhere):
    @decorated
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.inner.shortened(self.config, x)


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Attends, False),
        (Cuts, True),
        (CutsInAModule, True),
        (CutsByAStaticMethod, True),
        (CutsByAnObject, True),
        (CutsByATable, True),
        (CutsByAFunctionItHolds, True),
        (CutsByItsConfig, True),
        (CutsUnderADecorator, True),
    ],
)
def test_a_length_is_kept_where_code_reads_such_a_number(module: type, kept: bool) -> None:
    """Proofs at full length take seconds: the square of it is computed again and again."""
    from kpt.ops.capture import observe
    from kpt.ops.examples import Examples

    given = torch.randn(1, 96, 8)
    functions = observe(module(), [Call((given,))]).functions.values()
    (attention,) = (one for one in functions if one.callee == "F.scaled_dot_product_attention")
    protected = Examples(attention).protected
    assert (96 in protected) is kept and 2 in protected
    found = ops.recognise(module().eval(), [Call((given,))])
    assert [site.op for site in found.sites if site.kind != "module"] == ["attention"], found.left_alone
