"""Peak memory of a call, and how much a workspace holds beyond the user's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(function: Callable[[], Any], device_type: str | None = None) -> float:
    """Bytes allocated at the highest point of ``function()``, above what was held before it.

    ``device_type`` is where the model is; without it, the accelerator if there is one. On an accelerator
    the bytes are from its allocator's statistics; on a CPU from the profiler's allocation events, which
    see every tensor that torch allocates.
    """
    if device_type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        function()
        torch.accelerator.synchronize()
        return float(torch.accelerator.max_memory_allocated() - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    del result
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def derived_bytes(model: torch.nn.Module, workspace: torch.nn.Module | None) -> int:
    """Bytes of tensors that hang on the workspace's modules and are not the model's own."""
    if workspace is None:
        return 0
    known = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    total = 0
    for module in workspace.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, torch.Tensor):
                key = _storage(tensor)
                if key not in known:
                    known.add(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # opaque layouts (packed weights) have no storage
        return id(tensor)
