"""What of torch's global state decides how a call computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

_any_autocast = torch._C._is_any_autocast_enabled
_deterministic = torch._C._get_deterministic_algorithms
_transform = torch._C._functorch.peek_interpreter_stack
_function_modes = torch._C._len_torch_function_stack
_function_mode_at = torch._C._get_function_stack_at


def autocast_devices() -> tuple[str, ...]:
    """Kinds of devices here that have an autocast state."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def default_devices() -> tuple[str, ...] | None:
    """Where new tensors are made, outermost first, as `torch.set_default_device` and ``with device:`` say it.

    torch does this with function modes; None where a mode of another kind is among them, which may see and
    change every operation.
    """
    found: list[str] = []
    for index in range(_function_modes()):
        mode = _function_mode_at(index)
        if type(mode) is not DeviceContext:
            return None
        found.append(str(mode.device))
    return tuple(found)


def ambient_state() -> tuple[Any, ...]:
    """What of torch's global state decides how a call computes."""
    autocast: tuple[Any, ...] = ()
    if _any_autocast():
        autocast = tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in autocast_devices()
        )
    return (
        autocast,
        _deterministic(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        default_devices(),
    )


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation sees what calls compute."""
    return _transform() is not None or forward_ad._current_level >= 0
