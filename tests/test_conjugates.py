"""Tensors whose memory holds the conjugate, or the negative, of their values: no plan reads it as it is."""

from __future__ import annotations

import pytest
import torch

import kpt
from kpt.compiling import CompiledForward
from kpt.kernels import SiteTable
from slow_models import DirectScale, SlowScale, plugin

_conjugate = torch.view_as_complex(torch.randn(4, 16, 2)).conj()
NEGATIVE, PLAIN = _conjugate.imag, _conjugate.resolve_conj().imag


class Real(torch.nn.Module):
    def forward(self, x):
        return x * 2.0


@torch.no_grad()
def test_compiled_code_is_told_apart():
    forward = CompiledForward(Real().forward, backend="eager")
    assert forward(PLAIN).equal(PLAIN * 2.0)
    forward.seal()
    forward(PLAIN)
    assert (forward.executions, forward.misses) == (2, 0)
    assert NEGATIVE.is_neg() and NEGATIVE.stride() == PLAIN.stride()
    assert forward(NEGATIVE).equal(NEGATIVE * 2.0)
    assert (forward.executions, forward.misses) == (2, 1)


@pytest.mark.parametrize(
    ("known", "other"),
    [(PLAIN, NEGATIVE), (_conjugate, _conjugate.resolve_conj()), (_conjugate, torch._neg_view(_conjugate))],
)
def test_kernels_are_told_apart(known, other):
    table = SiteTable("site")
    assert table.admits((known,), {})
    table.frozen = True
    assert table.admits((known,), {})
    assert not table.admits((other,), {}) and table.misses == 1


class Memory(DirectScale):
    """Takes the memory of its input for the values."""

    def replacement(self):
        def forward(self, x):
            values = torch.empty(0, dtype=x.dtype)
            values.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
            return values * self.weight + self.bias

        return forward


@torch.no_grad()
@pytest.mark.parametrize("example", [torch.randn(32, 16), torch.randn(32, 16, dtype=torch.complex64)])
def test_calls_are_told_apart(example):
    model = SlowScale().eval()
    kpt.optimize(model, example, plugins=[plugin(Memory)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    model(example)
    others = [torch._neg_view(example), *([example.conj()] if example.is_complex() else [])]
    for number, other in enumerate(others, 1):
        torch.testing.assert_close(model(other), other * model.weight + model.bias)
        assert kpt.report(model).calls["fallback"] == number
