"""What of torch's global state decides how a call computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

_any_autocast = torch._C._is_any_autocast_enabled
_deterministic = torch._C._get_deterministic_algorithms
_transform = torch._C._functorch.peek_interpreter_stack


def autocast_devices() -> tuple[str, ...]:
    """Kinds of devices here that have an autocast state."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def ambient_state() -> tuple[Any, ...]:
    """What of torch's global state decides how a call computes."""
    autocast: tuple[Any, ...] = ()
    if _any_autocast():
        autocast = tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in autocast_devices()
        )
    return (autocast, _deterministic(), torch.get_default_dtype(), torch.get_float32_matmul_precision())


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation sees what calls compute."""
    return _transform() is not None or forward_ad._current_level >= 0
