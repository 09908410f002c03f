"""softmax, cross entropy, linear + cross entropy.

Bytes: softmax forward 2 passes over x, with backward 5 (y and dy are read, dx is written). Cross entropy
forward 1, with backward 2: logits read once, their gradient written once. Linear + cross entropy is timed in
milliseconds, with its memory at the peak over the inputs; the gradients alone are 1.04 GiB of that at
8192x4096x128256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case
from gpu.inputs import held, integers, random

SOFTMAX = ((65536, 1024), (16384, 4096), (4096, 16384), (4096, 65536))
LOSSES = ((65536, 1000), (16384, 32000), (8192, 50257), (8192, 50304), (8192, 128256), (4096, 256000))
LINEAR = ((8192, 2048, 128256), (8192, 4096, 128256), (8192, 4096, 32000))
GOALS = {("cross_entropy", 8192, 128256): 3800}
LINEAR_GOALS = {(8192, 4096, 128256): 36.0}


def cases() -> Iterator[Case]:
    for rows, columns in SOFTMAX:
        for backward in (False, True):
            yield _softmax(rows, columns, backward)
    for rows, classes in LOSSES:
        for backward in (False, True):
            yield _cross_entropy(rows, classes, backward)
    for size in LINEAR:
        yield _linear(*size)


def _softmax(rows: int, columns: int, backward: bool) -> Case:
    inputs = held(lambda: (random(rows, columns).requires_grad_(backward), random(rows, columns, factor=0.5)))

    def prepare(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        x, dy = inputs()
        if not backward:
            return lambda: function(x)
        return lambda: torch.autograd.grad(function(x), x, dy)

    def liger() -> Callable[[], Any]:
        from liger_kernel.ops.softmax import LigerSoftmaxFunction

        return prepare(LigerSoftmaxFunction.apply)

    def quack() -> Callable[[], Any]:
        from quack import softmax

        return prepare(softmax)

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.softmax import softmax

        return prepare(softmax)

    def reference() -> Any:
        x, dy = inputs()
        wide = x.detach().float().requires_grad_(backward)
        y = torch.softmax(wide, -1)
        return torch.autograd.grad(y, wide, dy.float()) if backward else y

    return Case(
        op="softmax fwd+bwd" if backward else "softmax fwd",
        size=f"{rows}x{columns}",
        unit="GB/s",
        amount=rows * columns * 2 * (5 if backward else 2),
        contenders={
            "eager": lambda: prepare(lambda x: torch.softmax(x, -1)),
            "torch.compile": lambda: prepare(torch.compile(lambda x: torch.softmax(x, -1))),
            "liger": liger,
            "quack": quack,
            "kpt": kpt,
        },
        reference=reference,
        rank=5 if (rows, columns) == SOFTMAX[1] else 8,
    )


def _cross_entropy(rows: int, classes: int, backward: bool) -> Case:
    inputs = held(lambda: (random(rows, classes).requires_grad_(backward), integers(classes, rows)))

    def prepare(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        logits, target = inputs()
        if not backward:
            return lambda: function(logits, target)

        def call() -> Any:
            loss = function(logits, target)
            return loss.detach(), *torch.autograd.grad(loss, logits)

        return call

    def liger() -> Callable[[], Any]:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        # it writes the gradient over its logits: the first call is right, later ones read what it wrote
        return prepare(lambda x, t: LigerCrossEntropyFunction.apply(x, t, None)[0])

    def quack() -> Callable[[], Any]:
        from quack import cross_entropy

        return prepare(lambda x, t: cross_entropy(x, t, reduction="mean"))

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.losses import cross_entropy

        return prepare(cross_entropy)

    def reference() -> Any:
        logits, target = inputs()
        wide = logits.detach().float().requires_grad_(backward)
        loss = F.cross_entropy(wide, target)
        return (loss.detach(), *torch.autograd.grad(loss, wide)) if backward else loss

    return Case(
        op="cross_entropy fwd+bwd" if backward else "cross_entropy fwd",
        size=f"{rows}x{classes}",
        unit="GB/s",
        amount=rows * classes * 2 * (2 if backward else 1),
        contenders={
            "eager": lambda: prepare(F.cross_entropy),
            "torch.compile": lambda: prepare(torch.compile(F.cross_entropy)),
            "liger": liger,
            "quack": quack,
            "kpt": kpt,
        },
        reference=reference,
        goal=GOALS.get(("cross_entropy", rows, classes)) if backward else None,
        yardstick=None if backward else ("a sum over as many bytes", lambda: inputs()[0].sum),
        memory=backward,
        rank=(1 if backward else 3) if (rows, classes) in ((8192, 128256),) else 7,
        note="liger writes the gradient over its logits: only its first result is right" if backward else "",
    )


def _linear(rows: int, hidden: int, classes: int) -> Case:
    inputs = held(
        lambda: (
            random(rows, hidden).requires_grad_(),
            random(classes, hidden, factor=hidden**-0.5).detach().requires_grad_(),
            integers(classes, rows),
        )
    )

    def prepare(function: Callable[..., torch.Tensor], **options: Any) -> Callable[[], Any]:
        states, weight, target = inputs()

        def call() -> Any:
            loss = function(states, weight, target, **options)
            return loss.detach(), *torch.autograd.grad(loss, (states, weight))

        return call

    def plain(states: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(states, weight), target)

    def liger() -> Callable[[], Any]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return prepare(lambda x, w, t: LigerFusedLinearCrossEntropyFunction.apply(x, w, t)[0])

    def kpt(**options: Any) -> Callable[[], Any]:
        from kpt_plugin_triton.linear_losses import linear_cross_entropy

        return prepare(linear_cross_entropy, **options)

    def reference() -> Any:
        states, weight, target = (value.detach() for value in inputs())
        return _in_fp32(states, weight, target)

    def products() -> Callable[[], Any]:
        states, weight, _ = (value.detach() for value in inputs())
        logits = states @ weight.t()
        gradient = torch.softmax(logits, -1).div_(rows)
        results = torch.empty_like(states), torch.empty_like(weight)

        def call() -> None:
            torch.mm(states, weight.t(), out=logits)
            torch.mm(gradient, weight, out=results[0])
            torch.mm(gradient.t(), states, out=results[1])

        return call

    contenders: Mapping[str, Callable[[], Callable[[], Any]]] = {
        "eager": lambda: prepare(plain),
        "torch.compile": lambda: prepare(torch.compile(plain)),
        "liger": liger,
        "kpt": kpt,
        "kpt, 2048 rows at once": lambda: kpt(rows_at_once=2048),
        "kpt, 1024 rows at once": lambda: kpt(rows_at_once=1024),
    }
    return Case(
        op="linear_cross_entropy fwd+bwd",
        size=f"{rows}x{hidden}x{classes}",
        unit="ms",
        amount=6 * rows * hidden * classes,
        contenders=contenders,
        reference=reference,
        goal=LINEAR_GOALS.get((rows, hidden, classes)),
        yardstick=("its three products alone, by cuBLAS", products),
        memory=True,
        rank=0 if (rows, hidden, classes) in LINEAR_GOALS else 6,
        note=f"the gradients alone are {2 * hidden * (rows + classes) / 2**30:.2f} GiB of the memory",
    )


def _in_fp32(states: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
    """Loss and gradients in fp32, 1024 rows at a time, because whole logits would be gigabytes."""
    rows = len(states)
    wide = weight.float()
    loss = torch.zeros((), device=states.device)
    grads = torch.empty(states.shape, device=states.device), torch.zeros_like(wide)
    for start in range(0, rows, 1024):
        part = slice(start, start + 1024)
        logs = torch.log_softmax(states[part].float() @ wide.t(), -1)
        loss -= logs.gather(1, target[part, None]).sum() / rows
        logs.exp_()
        logs.scatter_add_(1, target[part, None], torch.full_like(logs[:, :1], -1.0))
        logs /= rows
        grads[0][part] = logs @ wide
        grads[1].addmm_(logs.t(), states[part].float())
    return loss, *grads
