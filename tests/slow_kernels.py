"""Kernels for `rms_norm` that are faster than `SlowNorm`, and most of them wrong in one way."""

from __future__ import annotations

import sys
import time

import torch

import slow_models


def right(x, weight=None, eps=1e-6, offset=0.0):
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * (weight + offset)


def one_percent(x, weight=None, eps=1e-6, offset=0.0):
    return right(x, weight, eps, offset) * 1.01


def nan(x, weight=None, eps=1e-6, offset=0.0):
    result = right(x, weight, eps, offset)
    result.view(-1)[-1] = float("nan")
    return result


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        ctx.save_for_backward(x, weight)
        return right(x, weight, eps, offset)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight * 0.5, (grad * x).reshape(-1, x.shape[-1]).sum(0), None, None


def wrong_gradient(x, weight=None, eps=1e-6, offset=0.0):
    return _WrongGradient.apply(x, weight, eps, offset)


def contiguous_only(x, weight=None, eps=1e-6, offset=0.0):
    """Reads the storage as if it were contiguous, as a kernel that ignores strides does."""
    flat = x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return right(flat, weight, eps, offset)


def overflows(x, weight=None, eps=1e-6, offset=0.0):
    """An exponential over no maximum: infinite beyond 88, and the sum with it not a number."""
    return right(x, weight, eps, offset) + 0.0 * torch.exp(x.abs())


def contiguous_only_when_wide(x, weight=None, eps=1e-6, offset=0.0):
    return (contiguous_only if x.shape[-1] >= 40 else right)(x, weight, eps, offset)


#: Widths on which `hangs_when_wide` was called.
widths: set[int] = set()


def hangs_when_wide(x, weight=None, eps=1e-6, offset=0.0):
    widths.add(x.shape[-1])
    while x.shape[-1] >= 36:
        time.sleep(0.001)
    return right(x, weight, eps, offset)


def even_rows_only(x, weight=None, eps=1e-6, offset=0.0):
    rows = x.reshape(-1, x.shape[-1])
    done = right(rows, weight, eps, offset)
    if rows.shape[0] % 2:
        done[-1] = 0.0
    return done.reshape(x.shape)


def modifies_input(x, weight=None, eps=1e-6, offset=0.0):
    result = right(x, weight, eps, offset)
    x.mul_(0.5)
    return result


class _Replay:
    def __init__(self):
        self.last = {}

    def __call__(self, x, weight=None, eps=1e-6, offset=0.0):
        key = (x.shape, x.dtype, x.stride())
        if key not in self.last:
            self.last[key] = right(x, weight, eps, offset)
        return self.last[key]


replays = _Replay()


def leaves_unwritten(x, weight=None, eps=1e-6, offset=0.0):
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = result.view(-1, x.shape[-1])
    done = right(x, weight, eps, offset).reshape(rows.shape)
    rows[: max(1, rows.shape[0] - 1)] = done[: max(1, rows.shape[0] - 1)]
    return result


def slower(x, weight=None, eps=1e-6, offset=0.0):
    for _ in range(600):
        x = x.neg().neg()
    return right(x, weight, eps, offset)


class NormNet(torch.nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width)
        self.norm = slow_models.SlowNorm(width)
        self.batch = torch.nn.BatchNorm1d(width)
        self.last = torch.nn.Linear(width, 4)

    def forward(self, x):
        return self.last(self.batch(self.norm(self.first(x))))


class FiveWidths(torch.nn.Module):
    """Norms of five sizes, the widest of which comes last and alone."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 16, 24, 24, 32, 32, 36, 36, 40)
        self.norms = torch.nn.ModuleList(slow_models.SlowNorm(width) for width in widths)

    def forward(self, x):
        return torch.cat([norm(x[:, : norm.weight.numel()]) for norm in self.norms], dim=-1)


def raises(x, weight=None, eps=1e-6, offset=0.0):
    raise ValueError("this kernel is broken")


def exits(x, weight=None, eps=1e-6, offset=0.0):
    sys.exit(3)


def ignores_masks(q, k, v, mask=None, is_causal=False, scale=None):
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True
    )
