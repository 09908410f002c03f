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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from kpt.ops.clone import clone

if TYPE_CHECKING:
    from kpt.judge.calls import Call

_KEPT_ELEMENTS = 1 << 20
_CALL_IMPL = torch.nn.Module._call_impl.__code__
#: Builtins worth a second run, because the profiler does not show their arguments.
_BUILTINS: frozenset[Any] = frozenset({F.scaled_dot_product_attention, torch.softmax})
_OWN_FILES = (torch.__path__[0],)


@dataclass(frozen=True)
class Seen:
    """What was seen of a tensor. ``value`` is kept for integer and boolean ones only."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Seen:
        keep = not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _KEPT_ELEMENTS
        value = tensor.detach() if keep else None
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), tensor.device, value)


def see(value: Any) -> Any:
    """``value`` with every tensor replaced by what is worth remembering of it."""
    if isinstance(value, torch.Tensor):
        return Seen.of(value)
    if type(value) in (tuple, list):
        return type(value)(see(item) for item in value)
    if type(value) is dict:
        return {key: see(item) for key, item in value.items()}
    return value


@dataclass
class Captured:
    """The calls of one site: distinct ones only, with their arguments by parameter name.

    For a function or a named call, ``module`` is the module whose method ``attribute`` makes the
    call, and ``callee`` the name it uses (``apply_rotary_pos_emb``, ``F.softmax``; ``TABLE[]`` for
    an entry of a table of functions).
    """

    path: str
    module: torch.nn.Module
    signature: inspect.Signature
    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    function: Callable[..., Any] | None = None
    callee: str = ""
    attribute: str = "forward"
    count: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    def tensors(self) -> dict[str, Seen]:
        """The tensor arguments of the first call."""
        return {name: value for name, value in self.calls[0].items() if isinstance(value, Seen)}

    @property
    def output(self) -> Any:
        return self.outputs[0] if self.outputs else None

    def record(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], limit: int = 6
    ) -> dict[str, Any] | None:
        self.count += 1
        if self.count > 64 and len(self.calls) >= limit:
            return None
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        call = {name: see(value) for name, value in bound.arguments.items()}
        if len(self.calls) >= limit or any(_alike(call, known) for known in self.calls):
            return None
        self.calls.append(call)
        self.outputs.append(None)
        return call


def _alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, Seen) or one is None or isinstance(one, (bool, int, float, str)):
        return bool(one == other)
    return True


@dataclass
class Observation:
    """Everything captured in the runs of one model."""

    modules: dict[str, Captured] = field(default_factory=dict)
    functions: dict[tuple[str, str, str], Captured] = field(default_factory=dict)
    failure: str | None = None


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


def forward_signature(module: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


@lru_cache(maxsize=4096)
def methods(cls: type) -> dict[types.CodeType, str]:
    """The code of each Python method of a module class (also inside decorators), by its name."""
    found: dict[types.CodeType, str] = {}
    for base in cls.__mro__:
        if base is torch.nn.Module or base is object:
            break
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("__"):
                for code in codes_of(value):
                    found.setdefault(code, name)
    return found


def codes_of(function: types.FunctionType, depth: int = 4) -> Iterator[types.CodeType]:
    """The function's code and that of functions it closes over (what decorators leave behind)."""
    yield function.__code__
    if depth:
        for cell in function.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:
                continue
            if isinstance(inner, types.FunctionType):
                yield from codes_of(inner, depth - 1)


def callee_name(
    caller: types.CodeType, names: Mapping[str, Any], matches: Callable[[Any], bool]
) -> str | None:
    """How ``caller`` names a callee among its globals: ``f``, ``F.f``, ``torch.nn.f``, ``TABLE[]``."""
    spelled = caller.co_names
    for name in spelled:
        if name in names and matches(names[name]):
            return name
    for name in spelled:
        root = names.get(name)
        if isinstance(root, types.ModuleType):
            for path in _attributes(root, spelled, 3):
                if matches(path[1]):
                    return f"{name}.{path[0]}"
    for name in spelled:
        table = names.get(name)
        if isinstance(table, Mapping) and any(matches(value) for value in list(table.values())):
            return f"{name}[]"
    return None


def _attributes(root: types.ModuleType, names: Iterable[str], depth: int) -> Iterator[tuple[str, Any]]:
    """What can be reached from a package through attributes in ``names``, the shortest paths first."""
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(depth):
        below: list[tuple[str, Any]] = []
        for path, package in level:
            for name in names:
                value = vars(package).get(name)
                if value is not None and value is not package:
                    yield path + name, value
                    if isinstance(value, types.ModuleType):
                        below.append((f"{path}{name}.", value))
        level = below


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
            callee = self.callees[key] = _held_callee(module, caller.f_code, code) or ""
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


def _held_callee(module: torch.nn.Module, caller: types.CodeType, code: types.CodeType) -> str | None:
    """``self.name`` if the module holds the function under a name that the caller uses."""
    for name in caller.co_names:
        held = vars(module).get(name)
        if held is None and isinstance(getattr(type(module), name, None), property):
            held = getattr(module, name)
        if isinstance(held, types.FunctionType) and held.__code__ is code:
            return f"self.{name}"
    return None


def resolve_callee(callee: str, names: Mapping[str, Any], code: types.CodeType | None = None) -> Any:
    """The function behind a callee name, as `callee_name` spells it."""
    if callee.endswith("[]"):
        for value in names[callee[:-2]].values():
            if code is None or getattr(value, "__code__", None) is code:
                return value
        return None
    first, *rest = callee.split(".")
    value = names.get(first)
    for part in rest:
        value = getattr(value, part, None)
    return value


def builtin_signature(function: Any) -> inspect.Signature | None:
    """The signature of a Python function, or of one of the few builtins that are watched."""
    if function is F.scaled_dot_product_attention:
        return inspect.signature(_sdpa_signature)
    if function is torch.softmax:
        return inspect.signature(_softmax_signature)
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _sdpa_signature(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The signature of ``scaled_dot_product_attention``, which is a builtin without one."""


def _softmax_signature(input: Any, dim: Any, dtype: Any = None) -> None:
    """The signature of ``torch.softmax``."""


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
                observation.failure = f"the model raised {type(error).__name__}: {error}"
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
