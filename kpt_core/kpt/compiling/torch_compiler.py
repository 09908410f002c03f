"""What torch's compiler is told before it compiles, and what it keeps that must be let go."""

from __future__ import annotations

import functools
import logging
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

#: What `functools.lru_cache` and `functools.cache` make of a function.
_CACHED = type(functools.cache(lambda: None))


@contextmanager
def settings_of(dynamo: Mapping[str, Any], inductor: Mapping[str, Any], *, dynamic: bool) -> Iterator[None]:
    """Compile a whole graph or raise, under these settings of dynamo's and inductor's.

    Names that this version of dynamo does not know are left out; ``dynamic``: dimensions are declared.
    """
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    import torch.fx.experimental._config as symbolic_config

    settings = {
        "fail_on_recompile_limit_hit": True,
        "record_runtime_overhead": False,
        "suppress_errors": False,
        **_messages_logged_once(dynamo_config),
        # A gradient that a forward takes of its own, forces of an energy say, is part of its graph.
        "trace_autograd_ops": True,
        **dynamo,
    }
    with ExitStack() as stack:
        known = {name: value for name, value in settings.items() if hasattr(dynamo_config, name)}
        stack.enter_context(dynamo_config.patch(**known))
        # The backward graph is compiled with the forward one: later, these settings are gone.
        if hasattr(functorch_config, "force_non_lazy_backward_lowering"):
            stack.enter_context(functorch_config.patch(force_non_lazy_backward_lowering=True))
        if dynamic:
            # Two dimensions that happen to be equal in the example are not one dimension.
            stack.enter_context(symbolic_config.patch(use_duck_shape=False))
        if inductor:
            import torch._inductor.config as inductor_config

            stack.enter_context(inductor_config.patch(dict(inductor)))
        yield


def _messages_logged_once(dynamo_config: Any) -> dict[str, set[Any]]:
    """The setting by which dynamo goes over methods of loggers that write a message only the first time.

    Libraries add them to `logging.Logger`, around a cache. Eager's own calls have written these messages
    before anything is compiled; all others end a graph, since they have to be written at each call.
    """
    once = {method for method in vars(logging.Logger).values() if isinstance(method, _CACHED)}
    for name in ("ignore_logging_functions", "ignore_logger_methods"):  # the second is the older name
        if once and hasattr(dynamo_config, name):
            return {name: getattr(dynamo_config, name) | once}
    return {}


@contextmanager
def marked_dynamic(
    tensors: Mapping[str, torch.Tensor], dims: Mapping[str, Mapping[int, Any]]
) -> Iterator[None]:
    """Mark the declared dimensions of ``tensors`` while a graph is captured.

    A dimension of size 0 or 1 stays static: dynamo specialises to those sizes anyhow and a mark
    would be an error. The marks are attributes of the tensors and are taken off again.
    """
    marked: list[tuple[torch.Tensor, set[str]]] = []
    try:
        for name, tensor in tensors.items():
            axes = [axis for axis in dims.get(name, ()) if axis < tensor.dim() and tensor.shape[axis] > 1]
            if not axes:
                continue
            marked.append((tensor, set(tensor.__dict__)))
            for axis in axes:
                torch._dynamo.mark_dynamic(tensor, axis)
        yield
    finally:
        for tensor, before in marked:
            for attribute in set(tensor.__dict__) - before:
                del tensor.__dict__[attribute]


class _Kept(logging.Filter):
    """Takes the errors that torch logs in one thread out of what handlers write."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        mine = record.thread == self.thread and record.name.partition(".")[0] == "torch"
        if not mine or record.levelno < logging.ERROR:
            return True
        if (message := record.getMessage()) not in self.messages:  # several handlers may be asked
            self.messages.append(message)
        return False


@contextmanager
def errors_kept() -> Iterator[list[str]]:
    """What torch logs as errors in this thread while the block runs, instead of writing it.

    Dynamo logs what it then raises; who tries whether a model compiles reports that itself.
    """
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = {handler for name in names for handler in logging.getLogger(name).handlers}
    handlers.update(logging.root.handlers, [logging.lastResort] if logging.lastResort else [])
    kept = _Kept()
    for handler in handlers:
        handler.addFilter(kept)
    try:
        yield kept.messages
    finally:
        for handler in handlers:
            handler.removeFilter(kept)


def release_guards(guards: list[Any]) -> None:
    """Let go of what outlives compiled code: dynamo ties guards to the life of what they name.

    Those are parameters, types and functions that live on, so that each compilation would stay in
    memory. Shape environments, too, stay in caches of their class's methods.
    """
    if not guards:
        return
    mine = {id(guard) for guard in guards}
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        callback = (finalizer.peek() or (None, None))[1]
        owner = getattr(getattr(callback, "func", None), "__self__", None)
        if id(getattr(owner, "guard_manager", None)) in mine:
            finalizer.detach()
    for method in vars(torch.fx.experimental.symbolic_shapes.ShapeEnv).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()


def module_cache() -> Any:
    """Inductor's cache of generated modules, or None while inductor isn't loaded."""
    codecache = sys.modules.get("torch._inductor.codecache")
    return codecache.PyCodeCache if codecache is not None else None


@contextmanager
def loaded_modules(found: list[Any]) -> Iterator[None]:
    """Add to ``found`` the Python modules that inductor loads: its cache keeps them, constants included."""
    cache = module_cache()
    before = len(cache.modules) if cache is not None else 0
    try:
        yield
    finally:
        cache = module_cache()
        if cache is not None:
            found.extend(cache.modules[before:])


def forget_modules(modules: list[Any]) -> None:
    """Drop generated modules from inductor's cache and from Python's."""
    cache = module_cache()
    if cache is None:
        return
    mine = {id(module) for module in modules}
    cache.modules[:] = [module for module in cache.modules if id(module) not in mine]
    for path, module in list(cache.modules_no_attr.items()):
        if id(module) in mine:
            del cache.modules_no_attr[path]
    for name, module in sys.modules.copy().items():  # other threads may import meanwhile
        if id(module) in mine:
            del sys.modules[name]
    for module in modules:
        cache.linemaps.pop(module.__file__, None)
