"""Modules that look like an op and compute something else are left alone, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from recognised import MLP, PlusOne, RMSNorm, X, only_site, reason, recognised


class HalfClamp(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states)
        return out.clamp(-100.0, 100.0) if hidden_states.dtype == torch.float16 else out


class HalfScale(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = 2.0 if hidden_states.dtype == torch.bfloat16 else 1.0
        return super().forward(hidden_states * scale) * scale


class AlwaysClamped(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.clamp(-6e4, 6e4))


class Running(RMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return super().forward(hidden_states)


class Counting(RMSNorm):
    calls = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return super().forward(hidden_states) * (2.0 if self.calls > 10_000 else 1.0)


class LongBranch(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states)
        return out * 2 if hidden_states.shape[1] > 700 else out


class SingleBranch(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if hidden_states.shape[1] == 1 else super().forward(hidden_states)


class GradBranch(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states)
        return out + 0.1 * hidden_states if torch.is_grad_enabled() else out


class AutocastBranch(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states)
        return out * 2 if torch.is_autocast_enabled("cpu") else out


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 0.5


class CustomBackward(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(StraightThrough.apply(hidden_states))


class ReadsValue(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        out = super().forward(hidden_states)
        return out * 2 if hidden_states.abs().max().item() > 1e9 else out


class OtherPower(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size = hidden_states.abs().mean(-1, keepdim=True)
        return self.weight * hidden_states / (size + self.variance_epsilon)


class Unbiased(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) * self.weight + self.bias


STATE = {"factor": 1.0}


class ReadsGlobal(RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * STATE["factor"]


def closure_counter() -> nn.Module:
    count = 0

    class Closure(RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return RMSNorm.forward(self, hidden_states) * (2.0 if count > 10_000 else 1.0)

    return Closure()


@pytest.mark.parametrize(
    ("module", "because"),
    [
        (HalfClamp(), "branch in float16"),
        (HalfScale(), "bfloat16"),
        (AlwaysClamped(), "magnitude"),
        (Running(), "buffers"),
        (Counting(), "writes the attribute"),
        (LongBranch(), "size of 701"),
        (SingleBranch(), "size of 1"),
        (GradBranch(), "gradient"),
        (AutocastBranch(), "autocast"),
        (CustomBackward(), "gradient"),
        (ReadsValue(), "aten::"),
        (OtherPower(), "something else"),
        (Unbiased(12), "something else"),
        (ReadsGlobal(), "mutable global"),
        (closure_counter(), "closure variable"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_lookalikes_are_left_alone_with_the_reason(module: nn.Module, because: str) -> None:
    assert because in reason(module, X)


def test_a_constant_output_proves_nothing() -> None:
    assert "constant" in reason(nn.Softmax(dim=-1), torch.randn(2, 5, 1))


def test_a_hook_a_parametrisation_or_an_own_forward_is_left_alone() -> None:
    hooked = RMSNorm()
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(hooked, X)
    inner = MLP()
    inner.two.register_forward_pre_hook(lambda *_: None)
    assert "hooks" in reason(inner, X)
    layer = nn.Linear(12, 12)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert "parametrised" in reason(layer, X)
    patched = RMSNorm()
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert "instance" in reason(patched, X)


def test_dropout_inside_holds_for_inference_only() -> None:
    module = MLP(nn.Sequential(nn.SiLU(), nn.Dropout(0.2)))
    module.eval()
    assert only_site(module, X).modes == ("inference",)
    module.train()
    assert "evaluation mode only" in reason(module, X)


def test_a_module_in_several_dtypes_has_to_return_what_the_op_does() -> None:
    assert only_site(RMSNorm().bfloat16(), X.bfloat16()).op == "rms_norm"
    # float32 weights make the result float32, where the op keeps the dtype of its input
    assert "returns float32" in reason(RMSNorm(), X.bfloat16())
    assert only_site(PlusOne(), X.bfloat16()).op == "rms_norm"


def test_what_a_shared_module_sees_is_all_looked_at() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).sum() + self.inner(x.flatten(0, 1)).sum()

    class RankBranch(RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            out = super().forward(hidden_states)
            return out * 2 if hidden_states.dim() == 2 else out

    assert "another of the shapes" in reason(Twice(RankBranch()), X, path="inner")
    found = recognised(Twice(RMSNorm()), X)
    assert [len(site.examples) for site in found.of("rms_norm")] == [2]
