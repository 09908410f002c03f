"""See what modules, functions and named torch calls receive while a model runs.

Hooks and function modes change what runs (``nn.TransformerEncoder`` leaves its fast path when a hook
or a mode is present), so the model is watched through the interpreter's profiler, which no library
looks at. Calls of builtins carry no arguments there; a second run under a function mode fetches them
and counts only where both runs took the same path. Runs happen on a copy without hooks.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kpt.error_text import summary
from kpt.ops.callees import (
    builtin_signature,
    callee_name,
    forward_signature,
    held_callee,
    methods,
    resolve_callee,
)
from kpt.ops.captured import Captured, Observation, see
from kpt.ops.clone import clone

if TYPE_CHECKING:
    from kpt.judge.calls import Call

_CALL_IMPL = torch.nn.Module._call_impl.__code__
#: Builtins worth a second run, because the profiler does not show their arguments.
_BUILTINS: frozenset[Any] = frozenset({F.scaled_dot_product_attention, torch.softmax})


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Put every random state back: Python's, NumPy's and torch's on each device."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


class _Watch:
    """The profiler's callback: keeps module calls, and function calls made by a module's method."""

    def __init__(self, model: torch.nn.Module, observation: Observation) -> None:
        self.observation = observation
        self.paths: dict[int, str] = {}
        self.methods: dict[types.CodeType, str] = {}
        self.modules: dict[str, torch.nn.Module] = {}
        for path, module in model.named_modules():
            self.paths[id(module)] = path
            self.modules[path] = module
            self.methods.update(methods(cast("Any", type(module))))
        self.signatures: dict[type, inspect.Signature | None] = {}
        self.callees: dict[tuple[types.CodeType, types.CodeType], str | None] = {}
        self.pending: dict[int, tuple[Captured, int]] = {}
        self.builtins: set[tuple[str, str]] = set()
        self.busy = False

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if self.busy:
            return
        if event == "call":
            if frame.f_code is _CALL_IMPL:
                self.busy = True
                try:
                    self._module(frame)
                finally:
                    self.busy = False
            elif frame.f_back is not None and frame.f_back.f_code in self.methods:
                self.busy = True
                try:
                    self._function(frame, frame.f_back)
                finally:
                    self.busy = False
        elif event == "return":
            if self.pending:
                waiting = self.pending.pop(id(frame), None)
                if waiting is not None:
                    self.busy = True
                    try:
                        waiting[0].outputs[waiting[1]] = see(arg)
                    finally:
                        self.busy = False
        elif event == "c_call" and arg in _BUILTINS:
            path = self._caller(frame)
            if path is not None:
                self.builtins.add((path, frame.f_code.co_name))

    def _module(self, frame: types.FrameType) -> None:
        values = frame.f_locals
        module = values["self"]
        path = self.paths.get(id(module))
        if path is None:
            return
        captured = self.observation.modules.get(path)
        if captured is None:
            cls = type(module)
            if cls not in self.signatures:
                self.signatures[cls] = forward_signature(module)
            signature = self.signatures[cls]
            if signature is None:
                return
            captured = self.observation.modules[path] = Captured(path, module, signature)
        if captured.record(values["args"], values["kwargs"]) is not None:
            self.pending[id(frame)] = (captured, len(captured.calls) - 1)

    def _caller(self, frame: types.FrameType) -> str | None:
        """The path of the module whose method this frame runs."""
        names = frame.f_code.co_varnames
        if frame.f_code not in self.methods or not names:
            return None
        return self.paths.get(id(frame.f_locals.get(names[0])))

    def _function(self, frame: types.FrameType, caller: types.FrameType) -> None:
        code = frame.f_code
        if code in self.methods or code.co_name in (
            "__call__",
            "_wrapped_call_impl",
            "<lambda>",
            "<listcomp>",
        ):
            return
        key = (caller.f_code, code)
        if key not in self.callees:
            self.callees[key] = callee_name(
                caller.f_code, caller.f_globals, lambda value: getattr(value, "__code__", None) is code
            )
        callee = self.callees[key]
        path = self._caller(caller)
        if path is None:
            return
        if callee is None:
            module = self.modules[path]
            callee = self.callees[key] = held_callee(module, caller.f_code, code) or ""
        if callee.startswith("self."):
            function = getattr(self.modules[path], callee[5:], None)
        else:
            function = resolve_callee(callee, caller.f_globals, code) if callee else None
        if function is None:
            return
        args, kwargs = _frame_arguments(frame)
        self.add_function(path, self.methods[caller.f_code], callee, function, args, kwargs, frame)

    def add_function(
        self,
        path: str,
        attribute: str,
        callee: str,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: types.FrameType | None = None,
    ) -> Captured | None:
        """Note a call; returns its captured site when the call was unlike those known."""
        key = (path, attribute, callee)
        captured = self.observation.functions.get(key)
        if captured is None:
            signature = builtin_signature(function)
            if signature is None:
                return None
            captured = Captured(path, self.modules[path], signature, [], [], function, callee, attribute)
            self.observation.functions[key] = captured
        if captured.function is not function or captured.record(args, kwargs) is None:
            return None
        if frame is not None:
            self.pending[id(frame)] = (captured, len(captured.calls) - 1)
        return captured


def _frame_arguments(frame: types.FrameType) -> tuple[tuple[Any, ...], dict[str, Any]]:
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames
    positional = code.co_argcount
    args = [values[name] for name in names[:positional] if name in values]
    keyword = {name: values[name] for name in names[positional : positional + code.co_kwonlyargcount]}
    position = positional + code.co_kwonlyargcount
    if code.co_flags & inspect.CO_VARARGS:
        args.extend(values[names[position]])
        position += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        keyword.update(values[names[position]])
    return tuple(args), keyword


class _Named(TorchFunctionMode):
    """Fetches the arguments of watched builtins."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch
        self.builtins: set[tuple[str, str]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _BUILTINS:
            frame = sys._getframe(1)
            path = self.watch._caller(frame)
            if path is not None:
                self.builtins.add((path, frame.f_code.co_name))
                callee = callee_name(frame.f_code, frame.f_globals, lambda value: value is func)
                if callee is not None:
                    attribute = self.watch.methods[frame.f_code]
                    captured = self.watch.add_function(
                        path, attribute, callee, func, args, dict(kwargs or {})
                    )
                    if captured is not None:
                        captured.outputs[-1] = see(out)
        return out


def observe(model: torch.nn.Module, calls: Iterable[Call], limit: int = 4) -> Observation:
    """Run a copy of ``model`` on up to ``limit`` calls and return what its parts were given.

    The model, the inputs and the random states stay as they are. The captured modules belong to
    ``model`` itself.
    """
    observation = Observation()
    twin = clone(model)
    watch = _Watch(twin, observation)
    originals = dict(model.named_modules())
    with untouched_randomness(), torch.no_grad():
        for call in list(calls)[:limit]:
            previous = sys.getprofile()
            args, kwargs = _private((call.args, call.kwargs))
            try:
                sys.setprofile(watch)
                try:
                    twin(*args, **kwargs)
                finally:
                    sys.setprofile(previous)
                if watch.builtins:
                    args, kwargs = _private((call.args, call.kwargs))
                    with _Named(watch) as named:
                        twin(*args, **kwargs)
                    for path, _ in watch.builtins ^ named.builtins:
                        for key in [key for key in observation.functions if key[0] == path]:
                            if observation.functions[key].function in _BUILTINS:
                                del observation.functions[key]
            except Exception as error:  # noqa: BLE001 - whatever the model raises is the reason
                observation.failure = f"no op was looked for: watched, the model raised {summary(error)}"
                break
            watch.pending.clear()
    for captured in (*observation.modules.values(), *observation.functions.values()):
        captured.module = originals[captured.path]
    return observation


def _private(value: Any) -> Any:
    """Copies of inputs, so that caches and in-place writes stay away from the user's own."""
    memo: dict[int, Any] = {}

    def tensors(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            memo[id(item)] = item.detach().clone()
        elif isinstance(item, (tuple, list)):
            for inner in item:
                tensors(inner)
        elif isinstance(item, Mapping):
            for inner in item.values():
                tensors(inner)

    tensors(value)
    return copy.deepcopy(value, memo)
