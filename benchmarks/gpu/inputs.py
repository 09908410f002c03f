"""Random inputs of the cases, drawn when a contender asks for them; the same numbers for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kpt_plugin_triton.launch import is_recording

#: Where inputs lie.
DEVICE = "cuda"


def device() -> str:
    """`DEVICE`, or nowhere while launches are only recorded, for instance to compile them ahead of time."""
    return "meta" if is_recording() else DEVICE


_contender = 0


def fresh() -> None:
    """What is asked for from now on is drawn anew: a contender may write over its inputs."""
    global _contender
    _contender += 1


def held(make: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
    """``make``, called once for each device and contender (see `fresh`)."""
    made: dict[tuple[str, int], tuple[Any, ...]] = {}

    def inputs() -> tuple[Any, ...]:
        key = device(), _contender
        if key not in made:
            made.clear()
            made[key] = make()
        return made[key]

    return inputs


def _generator(seed: int) -> torch.Generator | None:
    return None if device() == "meta" else torch.Generator(device()).manual_seed(seed)


def random(*shape: int, factor: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normally distributed numbers times ``factor``; the same for the same shape."""
    drawn = torch.randn(shape, generator=_generator(sum(shape)), device=device(), dtype=dtype)
    return drawn * factor if factor != 1.0 else drawn


def integers(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=_generator(sum(shape)), device=device())


def step(function: Callable[..., Any], arguments: Sequence[Any], upstream: Any = None) -> Callable[[], Any]:
    """The call to time: ``function`` alone, or with ``upstream`` its gradients for what requires them."""
    if upstream is None:
        return lambda: function(*arguments)
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(function(*arguments), wanted, upstream)


def widened(arguments: Sequence[Any]) -> list[Any]:
    """The same in fp32, for references; what requires gradients still does."""
    return [
        x.detach().float().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in arguments
    ]
