"""Whether hooks and specs are what the API says: every message names the nearest right thing."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from graphlib import CycleError, TopologicalSorter
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy

from kpt import hookspecs
from kpt.plugins.isolation import REFERENCE
from kpt.specs import LEVELS, MODES, PHASES, SPEC_TYPES, PassSpec

DTYPES: tuple[str, ...] = (
    "float64 float32 tf32 float16 bfloat16 complex32 complex64 complex128 bool "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 int4 uint4 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2"
).split()  # type: ignore[assignment]
_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
    "tfloat32": "tf32",
    "fp8": "float8_e4m3fn",
    "int": "int32",
    "long": "int64",
}
_NAME = re.compile(r"[A-Za-z0-9][\w.+\-]*", re.ASCII)
_REFERENCES = frozenset("probe reference recogniser entry supports setup predict tuner".split())
_DTYPE_FIELDS = frozenset({"dtypes", "compute_dtype", "storage_dtype"})
_CHOICES: dict[str, tuple[str, ...]] = {"Level": LEVELS, "Mode": MODES, "Phase": PHASES}
#: The ops of the core's own catalogue, which imports torch; a test keeps the two equal.
CORE_OPS = "linear layer_norm rms_norm add_rms_norm gated_mlp rope attention softmax cross_entropy".split()
#: More specs than any plugin has; what an endless generator runs into.
SPEC_LIMIT = 10_000


class Invalid(Exception):
    """A hook or a spec is not what the API says."""


@cache
def known_hooks() -> tuple[str, ...]:
    """The names of the hooks, in the order of `kpt.hookspecs`."""
    return tuple(SPEC_TYPES)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names what is closest to ``name``, or all that there is."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(choices)}"


def hook_implementations(plugin: object) -> dict[str, list[Callable[[], Any]]]:
    """The implementations in ``plugin`` by hook; raises `Invalid` for names or arguments.

    Only attributes that are set are looked at, so that a lazily loading module stays unloaded.
    """
    if isinstance(plugin, type):
        raise Invalid(f"it names the class {plugin.__name__}; name a module or an instance")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    names = list(vars(plugin)) if isinstance(plugin, ModuleType) else dir(plugin)
    marked: dict[str, Any] = {}
    unmarked: list[str] = []
    for name in names:
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name.startswith("kpt_") and inspect.isroutine(getattr(plugin, name)):
                unmarked.append(name)
            continue
        hook = options.get("specname") or name
        if hook not in known_hooks():
            if options.get("optionalhook"):
                continue
            raise Invalid(f"there is no hook {hook!r}; {nearest(hook, known_hooks())}")
        if options.get("wrapper") or options.get("hookwrapper"):
            raise Invalid(f"{name} is a hook wrapper; every hook is collecting, return specs instead")
        marked[name] = getattr(plugin, name)
    for name in unmarked:
        if name in known_hooks():
            raise Invalid(f"{name} is not marked with @kpt.hookimpl")
        raise Invalid(
            f"{name} is not a hook (names that begin with kpt_ are); {nearest(name, known_hooks())}"
        )
    if not marked:
        raise Invalid("it has no function that is marked with @kpt.hookimpl")
    return _registered(manager, marked)


def _registered(manager: pluggy.PluginManager, marked: dict[str, Any]) -> dict[str, list[Callable[[], Any]]]:
    for name, function in marked.items():
        _check_arguments(name, function)
    holder = SimpleNamespace(**marked)
    for name in marked:
        if manager.parse_hookimpl_opts(holder, name) is None:
            raise Invalid(
                f"{name} is wrapped below its mark (a staticmethod?); put @kpt.hookimpl right above the def"
            )
    try:
        manager.register(holder, name="plugin")
    except pluggy.PluginValidationError as error:
        raise Invalid(str(error).strip().splitlines()[-1]) from error
    found: dict[str, list[Callable[[], Any]]] = {}
    for caller in manager.get_hookcallers(holder) or ():
        found[caller.name] = [implementation.function for implementation in caller.get_hookimpls()]
    return found


def _check_arguments(name: str, function: Callable[..., Any]) -> None:
    """Hooks take no arguments today; one that asks for some would fail when it is called."""
    required = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise Invalid(
            f"{name}({', '.join(required)}) asks for arguments that the hook does not have: {name}()"
        )


def collected(hook: str, returned: Any) -> list[Any]:
    """The specs in what an implementation of ``hook`` returned; consumes a generator.

    Raises `Invalid` where something in it is not a valid spec of the hook's type.
    """
    wanted = SPEC_TYPES[hook]
    if type(returned) in SPEC_TYPES.values():
        raise Invalid(f"{hook} returned one {type(returned).__name__}; return a list of {wanted.__name__}")
    if inspect.iscoroutine(returned):
        returned.close()
        raise Invalid(f"{hook} is a coroutine function; hooks are plain functions")
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, dict)):
        raise Invalid(f"{hook} returned {type(returned).__name__}; expected an iterable of {wanted.__name__}")
    found: list[Any] = []
    for spec in returned:
        if type(spec) is not wanted:
            raise Invalid(f"{hook} returned a {type(spec).__name__}; expected {wanted.__name__}")
        faults = list(spec_faults(spec))
        if faults:
            raise Invalid(f"{wanted.__name__} {getattr(spec, 'name', '')!r}: {faults[0]}")
        found.append(spec)
        if len(found) > SPEC_LIMIT:
            raise Invalid(f"{hook} returned more than {SPEC_LIMIT} specs; is its generator endless?")
    return found


def spec_faults(spec: Any) -> Iterator[str]:
    """What is wrong with the fields of ``spec``, one sentence a field."""
    for spec_field in fields(spec):
        fault = field_fault(spec_field.name, str(spec_field.type), getattr(spec, spec_field.name))
        if fault:
            yield fault


def field_fault(name: str, kind: str, value: Any) -> str:
    """What is wrong with one field of the annotated type ``kind``, or an empty string."""
    if kind.endswith(" | None"):
        if value is None:
            return ""
        kind = kind.removesuffix(" | None")
    if kind.startswith("tuple["):
        return _tuple_fault(name, kind.removeprefix("tuple[").partition(",")[0], value)
    if kind in _CHOICES or kind == "str":
        return _text_fault(name, kind, value)
    if kind == "bool":
        return "" if isinstance(value, bool) else f"{name}={value!r} is not True or False"
    if kind == "int":
        right = isinstance(value, int) and not isinstance(value, bool)
        return "" if right else f"{name}={value!r} is not an integer"
    if kind == "float":
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return "" if right and value > 0 else f"{name}={value!r} is not a positive number"
    raise TypeError(f"no rule for the field {name}: {kind}")


def _tuple_fault(name: str, kind: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{name}={value!r} is a string; write ({value!r},)"
    if not isinstance(value, tuple):
        return f"{name}={value!r} is a {type(value).__name__}; write a tuple"
    if name == "modes" and not value:
        return f"modes=() leaves nothing to do; name some of {', '.join(MODES)}"
    return next(filter(None, (_text_fault(name, kind, entry) for entry in value)), "")


def _text_fault(name: str, kind: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{name}={value!r} is a {type(value).__name__}; expected a string"
    if kind in _CHOICES:
        return "" if value in _CHOICES[kind] else f"{name}={value!r}: {nearest(value, _CHOICES[kind])}"
    if name in _REFERENCES:
        wrong = not REFERENCE.fullmatch(value)
        return f"{name}={value!r} is not of the form 'package.module:attribute'" if wrong else ""
    if name in _DTYPE_FIELDS and value not in DTYPES:
        nickname = _DTYPE_NICKNAMES.get(value.removeprefix("torch."), value.removeprefix("torch."))
        hint = f"did you mean {nickname!r}?" if nickname in DTYPES else nearest(nickname, DTYPES)
        return f"{name}={value!r} is not a dtype name; {hint}"
    if name in ("name", "op") and not _NAME.fullmatch(value):
        return f"{name}={value!r} is not a name; use letters, digits, '_', '-', '+' and '.'"
    return ""


def is_reference(name: str) -> bool:
    """Whether the spec field ``name`` holds a ``"module:attr"`` reference."""
    return name in _REFERENCES


def cycle(passes: Sequence[PassSpec]) -> list[str]:
    """The names of passes that wait for each other through tags inside a phase, or nothing."""
    for phase in PHASES:
        inside = [spec for spec in passes if spec.phase == phase]
        graph = {
            spec.name: {other.name for other in inside if set(other.provides) & set(spec.requires)}
            for spec in inside
        }
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return list(error.args[1])
    return []
