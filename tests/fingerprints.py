"""What a model and the process are, bit for bit, so that a test can show that nothing was left behind."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch._dynamo  # replaces functions of torch's when it is first imported
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import kpt
import slow_models
from kpt.transaction import watch

_KPT = os.path.dirname(kpt.__file__)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, preceded by its dtype and shape."""
    flat = tensor.detach().contiguous().reshape(-1)
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def of_model(model: torch.nn.Module) -> dict[str, Any]:
    """Every attribute's identity, every tensor's bits, gradients, hooks and modes, by name."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}|class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}|{name}"] = id(value)
            if isinstance(value, (dict, list, set)):
                found[f"{path}|{name}|contents"] = [id(v) for v in _values(value)]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}|bits"] = bits(tensor)
        found[f"{name}|memory"] = tensor.data_ptr()
        found[f"{name}|requires_grad"] = tensor.requires_grad
        hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
        found[f"{name}|hooks"] = [list(table or ()) for table in hooks]
        found[f"{name}|grad"] = None if tensor.grad is None else (id(tensor.grad), bits(tensor.grad))
    return found


def _values(container: Any) -> Iterator[Any]:
    yield from container.values() if isinstance(container, dict) else container


def of_process() -> dict[str, Any]:
    """Random states, flags, thread counts, environment and the like."""
    _end_dead_plans()
    return {
        "python random": random.getstate(),
        "numpy random": [
            part.tobytes() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()
        ],
        "torch random": bits(torch.get_rng_state()),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "flush denormal": float(torch.tensor(1e-40) * 1.0),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "anomaly": torch.is_anomaly_enabled(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.manager.disable, logging.root.level),
        "recursion": sys.getrecursionlimit(),
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGURG)],
        "hooks of all modules": [dict(table) for table in _global_hooks()],
        "shared code": {
            (owner.__name__, name): id(value)
            for owner in (
                torch,
                torch.linalg,
                torch.nn.Linear,
                torch.nn.BatchNorm1d,
                torch.nn.functional,
                slow_models.SlowScale,
            )
            for name, value in vars(owner).items()
            if callable(value)
        },
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


class _Watched:
    """Stands for a plan that hears of registrations."""


def _end_dead_plans() -> None:
    """A plan that dies with its model, in another test, leaves torch's registration hooks to the next one:
    they would be part of a fingerprint, and be gone from the one after it."""
    gc.collect()
    watched: Any = _Watched()
    watch._announcements.add(watched)
    watch._announcements.discard(watched)


def _global_hooks() -> Iterator[dict[Any, Any]]:
    for name, table in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and name.endswith("_hooks"):
            yield table
    yield optimizer._global_optimizer_pre_hooks
    yield optimizer._global_optimizer_post_hooks


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return sorted(
        name for name in {**before, **after} if before.get(name, "absent") != after.get(name, "absent")
    )


def ours(model: torch.nn.Module) -> list[str]:
    """Where an object of kpt's hangs on the model: attributes, their contents, and bound functions."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = [value, *(_values(value) if isinstance(value, (dict, list, set)) else ())]
            if any(_is_ours(item) for item in held):
                found.append(f"{path or 'model'}.{name}")
    return found


def _is_ours(value: Any) -> bool:
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    written_in_kpt = code is not None and code.co_filename.startswith(_KPT)
    return written_in_kpt or type(value).__module__.split(".")[0] == "kpt"


class _Count(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(model: torch.nn.Module, *args: Any) -> int:
    """How many operations a call of the model dispatches: work that no clock has to see."""
    with _Count() as count, torch.no_grad():
        model(*args)
    return count.operations


def optimized(model: torch.nn.Module, example: Any, **options: Any) -> torch.nn.Module:
    """``kpt.optimize`` with a plan that is accepted; a test whose plan was rejected proves nothing."""
    options = {"budget": 10.0, "cache": False, **options}
    result = kpt.optimize(model, example, **options)
    receipt = kpt.report(model)
    assert result is model
    assert receipt.optimized, (receipt.reason, receipt.rejected, receipt.skipped, receipt.notes)
    return model


def fast_calls(model: torch.nn.Module) -> int:
    """How many calls took the optimised path so far."""
    return int(kpt.report(model).calls["optimized"])


def fallbacks(model: torch.nn.Module) -> dict[str, int]:
    """Calls that ran the original forward, by reason."""
    return dict(kpt.report(model).calls["reasons"])
