"""Models that write an op out inline, slowly, and a stranger's kernels for these ops that count their calls.

Casts to double and back change no bit of a float32 tensor and take most of the time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kpt.specs import KernelSpec

calls: Counter[str] = Counter()


def detour(x: torch.Tensor, rounds: int) -> torch.Tensor:
    for _ in range(rounds):
        x = x.double().float()
    return x


class InlineNorm(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 4)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        mean = detour(y, 20).pow(2).mean(-1, keepdim=True)
        return self.last(y * torch.rsqrt(mean + 1e-6) * self.scale)


class InlineSoftmax(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        e = torch.exp(y - detour(y, 20).amax(-1, keepdim=True))
        return self.last(e / e.sum(-1, keepdim=True))


class InlineAttention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(width, 3 * width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = detour(q @ k.transpose(-1, -2) * 0.5, 3)
        return self.last((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(-2))


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "rms_norm": (InlineNorm, (256, 64)),
    "softmax": (InlineSoftmax, (256, 64)),
    "attention": (InlineAttention, (2, 128, 16)),
}


def built(op: str, training: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A model that computes ``op`` inline, and an example input."""
    torch.manual_seed(0)
    kind, shape = MODELS[op]
    return kind().train(training), torch.randn(shape)


# -- kernels: plain functions that any compiler can trace


def rms_norm(x: torch.Tensor, weight: Any = None, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    calls["rms_norm"] += 1
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * (weight + offset)


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    calls["softmax"] += 1
    return torch.softmax(x, dim)


def attention(
    q: Any, k: Any, v: Any, mask: Any = None, is_causal: bool = False, scale: Any = None, **more: Any
) -> torch.Tensor:
    calls["attention"] += 1
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)


def wrong_rms_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
    return rms_norm(*args, **kwargs) * 1.01


def wrong_softmax(*args: Any, **kwargs: Any) -> torch.Tensor:
    return softmax(*args, **kwargs) * 1.01


def wrong_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
    return attention(*args, **kwargs) * 1.01


class _CarelessNorm(torch.autograd.Function):
    """Right alone, wrong where its output is scaled by a weight: the weight's gradient is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
            found = torch.autograd.grad(rms_norm(*leaves, ctx.eps), leaves, grad)
        return found[0], found[1] * 1.01, None


def careless_rms_norm(x: Any, weight: Any = None, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    if weight is None:
        return rms_norm(x, None, eps)
    return _CarelessNorm.apply(x, weight + offset, eps)  # type: ignore[no-any-return, no-untyped-call]


@torch.library.custom_op("kpt_tests::counted_norm", mutates_args=())
def _counted(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(x, weight, eps)


@_counted.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight = ctx.saved_tensors
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
    inner = (grad * weight * x).mean(-1, keepdim=True)
    along = (grad * x * root).flatten(0, -2).sum(0)
    return root * (grad * weight - x * inner * root.pow(2)), along, None


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


_counted.register_autograd(_backward, setup_context=_setup)


def opaque_rms_norm(x: Any, weight: Any = None, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """A kernel that no compiler looks into, so that its calls can be counted in compiled code too."""
    weight = x.new_ones(x.shape[-1:]) if weight is None else weight + offset
    return _counted(x, weight, eps)  # type: ignore[no-any-return]


def kernel(op: str, entry: str = "", **options: Any) -> KernelSpec:
    options = {"backward": True, "compile_safe": True, "predicted_gain": 3.0, **options}
    return KernelSpec(op=op, name="toy", entry=f"inline_models:{entry or op}", **options)


def add_rms_norm(
    x: Any, residual: Any, weight: Any = None, eps: float = 1e-6, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    calls["add_rms_norm"] += 1
    total = x + residual
    return rms_norm(total, weight, eps, offset), total
