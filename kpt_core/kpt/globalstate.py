"""Everything global that a trial may disturb: what each piece is called, how it is read and put back."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch.nn.modules import module as torch_module


class Unreadable:
    """torch refuses to read some precision flags after its old and new ways to set them were mixed."""


UNREADABLE = Unreadable()


@dataclass(frozen=True)
class Item:
    """One piece of global state, with the ways to read it and to put it back."""

    name: str
    get: Callable[[], Any]
    put: Callable[[Any], Any]

    def read(self) -> Any:
        try:
            return self.get()
        except (RuntimeError, TypeError):
            return UNREADABLE

    def write(self, value: Any) -> None:
        try:
            self.put(value)
        except (RuntimeError, ValueError, TypeError) as error:
            warnings.warn(f"kpt could not put back {self.name}: {error}", RuntimeWarning, stacklevel=2)


def same(first: Any, second: Any) -> bool:
    """Whether two values of an item are equal."""
    if first is UNREADABLE or second is UNREADABLE:
        return first is second
    if isinstance(first, torch.Tensor):
        with torch._C.DisableTorchFunction():  # a mode may have been left on
            return torch.equal(first, second)
    if isinstance(first, (list, tuple)):
        if type(first) is not type(second) or len(first) != len(second):
            return False
        if set(map(type, first)) == {int} == set(map(type, second)):  # Python's random state: 625 of them
            return first == second
        return all(same(mine, yours) for mine, yours in zip(first, second, strict=True))
    if type(first).__module__.split(".")[0] == "numpy":
        return bool((first == second).all())
    return bool(first == second)


def global_items() -> list[Item]:
    """Everything that is remembered, in the order in which it is put back."""
    return [
        Item("hooks of all modules", _hook_tables, _put_hook_tables),
        *_flags(),
        *_compiler(),
        *_process(),
        # Last: putting other things back may consume random numbers.
        *_random_states(),
    ]


def _flags() -> list[Item]:
    return [*_modes(), *_numerics(), *_precision(), *_backend_flags()]


@contextmanager
def results_kept() -> Iterator[list[str]]:
    """Put torch's flags and the random states back after the block, and yield a list to name what it changed.

    They decide what later calls compute. For code that is trusted with all else: with streams, loggers,
    handlers and environment variables, which trackers set on purpose.
    """
    items = [*_flags(), *_random_states()]
    values = [item.read() for item in items]
    changed: list[str] = []
    try:
        yield changed
    finally:
        changed += put_back(items, values)[0]


def put_back(items: Sequence[Item], values: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Write each item's value where it differs; the names of those that did, and of those that still do."""
    changed: list[str] = []
    stuck: list[str] = []
    for item, value in zip(items, values, strict=True):
        if value is not UNREADABLE and not same(item.read(), value):
            changed.append(item.name)
            item.write(value)
            if not same(item.read(), value):
                stuck.append(item.name)
    return changed, stuck


def _modes() -> list[Item]:
    items = [
        Item("default device", _default_device, torch.set_default_device),
        Item("torch function modes", torch._C._len_torch_function_stack, _shrink_function_modes),
        Item("torch dispatch modes", torch._C._len_torch_dispatch_stack, _shrink_dispatch_modes),
        Item("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        Item("anomaly detection", torch.is_anomaly_enabled, torch.set_anomaly_enabled),
        Item(
            "multithreaded backward",
            torch._C._is_multithreading_enabled,
            torch._C._set_multithreading_enabled,
        ),
        Item("autocast cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    ]
    for kind in {"cpu", *_device_types()}:
        items += [
            Item(
                f"autocast of {kind}",
                partial(torch.is_autocast_enabled, kind),
                partial(torch.set_autocast_enabled, kind),
            ),
            Item(
                f"autocast dtype of {kind}",
                partial(torch.get_autocast_dtype, kind),
                partial(torch.set_autocast_dtype, kind),
            ),
        ]
    return items


def _numerics() -> list[Item]:
    def deterministic() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    return [
        Item("default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Item(
            "deterministic algorithms",
            deterministic,
            lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        ),
        _attribute("fill of uninitialised memory", torch.utils.deterministic, "fill_uninitialized_memory"),
        Item("threads", torch.get_num_threads, torch.set_num_threads),
        Item("flushing of denormal numbers", _flushes_denormals, torch.set_flush_denormal),
    ]


def _precision() -> list[Item]:
    """Precision of fp32 arithmetic. Setting one for all also sets the finer ones, so it comes first."""
    items = [
        Item(
            "float32 matmul precision",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        )
    ]
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    put = getattr(torch._C, "_set_fp32_precision_setter", None)
    if get is None or put is None:
        return items
    backends = [name for name in _backends() if not _refused(get, name)]
    for backend, op in [("generic", "all"), *itertools.product(backends, _PRECISION_OPS)]:
        item = Item(
            f"fp32 precision of {backend} {op}",
            partial(get, backend, op),
            partial(put, backend, op),
        )
        if item.read() is not UNREADABLE:  # not every backend has every one
            items.append(item)
    return items


@cache
def _refused(get: Callable[[str, str], Any], backend: str) -> bool:
    """Whether torch keeps no precision for ``backend``, whatever is set: of 15 in 17, at 10 µs a refusal."""
    for op in _PRECISION_OPS:
        try:
            get(backend, op)
        except RuntimeError as error:
            if "Unknown backend" in str(error):
                continue
        return False
    return True


def _backends() -> list[str]:
    return sorted(name for name, module in vars(torch.backends.m).items() if isinstance(module, ModuleType))


_PRECISION_OPS = ("all", "matmul", "conv", "rnn")
_SMALLEST = torch.tensor(torch.finfo(torch.float32).tiny)
_HOOK_TABLES = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

#: What the functions in torch._C are about that switch numerics or choose a library.
_SWITCHES = ("_allow_", "_enabled", "_deterministic", "_benchmark", "_preferred_", "_qengine", "_immediate")


@cache
def _switches() -> tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...]:
    """Flags that torch keeps as pairs of functions, by name: those of this build, whatever its vendors."""
    found = []
    for getter in sorted(dir(torch._C)):
        name = getter.removeprefix("_get_")
        if name == getter or "tf32" in name or not any(part in f"_{name}_" for part in _SWITCHES):
            continue  # the tf32 flags are old names of the precisions, and not always readable
        setter = getattr(torch._C, f"_set_{name}", None)
        if setter is None and name.endswith("_sdp_enabled"):
            setter = getattr(torch._C, f"_set_sdp_use_{name.removesuffix('_sdp_enabled')}", None)
        if setter is not None:
            found.append((name, getattr(torch._C, getter), setter))
    return tuple(found)


def _backend_flags() -> list[Item]:
    """Flags of torch.backends: those that its modules declare as properties, and the switches above."""
    items = [
        _attribute(f"{name}.{flag}", module, flag)
        for name, module in sorted(vars(torch.backends.m).items())
        for flag in _properties(module.__class__)
    ]
    for name, get, put in _switches():
        item = Item(name, get, partial(_put_switch, put))
        if item.read() is not UNREADABLE:
            items.append(item)
    return items


@cache
def _properties(module: type) -> tuple[str, ...]:
    """The flags that a module of torch.backends declares as properties.

    The precision ones are handled above; their old names cannot always be read.
    """
    return tuple(
        flag
        for flag, declared in vars(module).items()
        if type(declared).__name__ == "ContextProp" and flag not in ("allow_tf32", "fp32_precision")
    )


def _put_switch(put: Callable[..., Any], value: Any) -> None:
    """Some getters return a pair that their setters take as two arguments."""
    put(*value) if isinstance(value, tuple) else put(value)


def _compiler() -> list[Item]:
    """Configuration of torch's compiler, as far as it is loaded. Lists in it are compared by value."""
    items = []
    for name in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config"):
        config: Any = sys.modules.get(name)
        if config is not None and hasattr(config, "get_config_copy"):
            items.append(Item(name, config.get_config_copy, partial(_put_config, config)))
    return items


def _put_config(config: Any, saved: dict[str, Any]) -> None:
    now = config.get_config_copy()
    config.load_config({key: value for key, value in saved.items() if key not in now or now[key] != value})


def _process() -> list[Item]:
    return [
        Item("warning filters", lambda: list(warnings.filters), _put_filters),
        Item("threshold of logging", lambda: logging.root.manager.disable, logging.disable),
        Item("level of the root logger", lambda: logging.root.level, logging.root.setLevel),
        Item("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
        Item("garbage collector", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
        *_handlers(),
        Item("thresholds of the garbage collector", gc.get_threshold, lambda value: gc.set_threshold(*value)),
        Item("environment", lambda: dict(os.environ), _put_environment),
        Item("working directory", os.getcwd, os.chdir),
        _attribute("standard output", sys, "stdout"),
        _attribute("standard error", sys, "stderr"),
        _attribute("standard input", sys, "stdin"),
        _attribute("hook of uncaught errors", sys, "excepthook"),
        _attribute("hook of uncaught errors in threads", threading, "excepthook"),
        Item("profile function", sys.getprofile, _put_profile),
        Item("trace function", sys.gettrace, sys.settrace),
        Item("arguments of the program", lambda: list(sys.argv), partial(setattr, sys, "argv")),
    ]


def _put_profile(function: Any) -> None:
    enable = getattr(function, "enable", None)  # a profiler written in C, which Python cannot call
    if callable(enable):
        enable()
    else:
        sys.setprofile(function)


def _handlers() -> list[Item]:
    """Handlers of the signals that end a program; only the main thread may set them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [
        Item(f"handler of {number.name}", partial(signal.getsignal, number), partial(signal.signal, number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not None  # a handler that is not Python's could not be put back
    ]


def _random_states() -> list[Item]:
    items = [Item("random state of Python", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        items.append(Item("random state of NumPy", numpy.random.get_state, numpy.random.set_state))
    items.append(Item("random state of torch", torch.get_rng_state, torch.set_rng_state))
    for kind in _device_types():
        module: Any = torch.get_device_module(kind)
        if not getattr(module, "is_initialized", lambda: True)() or not hasattr(module, "get_rng_state"):
            continue  # reading would initialise it
        if hasattr(module, "get_rng_state_all"):
            items.append(Item(f"random state of {kind}", module.get_rng_state_all, module.set_rng_state_all))
        else:
            items.append(Item(f"random state of {kind}", module.get_rng_state, module.set_rng_state))
    return items


def seed_torch(seed: int) -> None:
    """Seed torch's generator and those of the devices in use.

    `torch.manual_seed` also leaves a seed for every device that is not initialised yet, which outlives any
    block: the user's own seed for it would be lost.
    """
    torch.default_generator.manual_seed(seed)
    for kind in _device_types():
        module: Any = torch.get_device_module(kind)
        if getattr(module, "is_initialized", lambda: True)():
            (getattr(module, "manual_seed_all", None) or module.manual_seed)(seed)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [] if accelerator is None else [accelerator.type]


def _flushes_denormals() -> bool:
    """Whether this thread computes with zero for the smallest numbers; torch has a way to set it only."""
    return float(_SMALLEST * 0.5) == 0.0


def _hook_tables() -> dict[str, Any]:
    """Hooks that are called for all modules, by the name of their table."""
    return {name: dict(getattr(torch_module, name)) for name in _HOOK_TABLES}


def _put_hook_tables(saved: dict[str, Any]) -> None:
    for name, hooks in saved.items():
        table = getattr(torch_module, name)
        table.clear()
        table.update(hooks)


def _attribute(name: str, owner: Any, attribute: str) -> Item:
    return Item(name, partial(getattr, owner, attribute), partial(setattr, owner, attribute))


def _default_device() -> torch.device | None:
    """The default device that was set, None if none was."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _shrink_function_modes(depth: int) -> None:
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()


def _shrink_dispatch_modes(depth: int) -> None:
    while torch._C._len_torch_dispatch_stack() > depth:
        torch._C._pop_torch_dispatch_stack(None)


def _put_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    for name in ("_filters_mutated", "_filters_mutated_lock_held"):
        mutated = getattr(warnings, name, None)
        if mutated is not None:  # invalidates the per-module caches of shown warnings
            mutated()
            break


def _put_environment(saved: dict[str, str]) -> None:
    for key in set(os.environ) - set(saved):
        del os.environ[key]
    for key, value in saved.items():
        if os.environ.get(key) != value:
            os.environ[key] = value
