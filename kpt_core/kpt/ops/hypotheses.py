"""What recognisers share: candidates for a hypothesis, read from a module without running it."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from kpt.ops.callees import codes_of
from kpt.ops.captured import Captured, Seen
from kpt.ops.mentions import names_in

if TYPE_CHECKING:
    import torch

#: Where an epsilon lives when it is neither an attribute nor a literal in the forward.
_USUAL_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


@dataclass(frozen=True)
class Literals:
    """The numbers and options that a region of a graph was written with, in place of a module's code."""

    numbers: tuple[float, ...]
    options: Mapping[str, Any]


def names_read(module: torch.nn.Module) -> frozenset[str]:
    """Names that the module's code mentions; for a region of a graph, its options."""
    literals = vars(module).get("_literals")
    if isinstance(literals, Literals):
        return frozenset({*literals.options, "softmax"})
    return attribute_names(type(module))


def numbers_written(module: torch.nn.Module) -> tuple[float, ...]:
    """Float literals in the module's code, or in a region of a graph."""
    literals = vars(module).get("_literals")
    return literals.numbers if isinstance(literals, Literals) else float_constants(cast("Any", type(module)))


def is_region(module: torch.nn.Module) -> bool:
    """Whether ``module`` stands for a region of a captured graph, rather than for one of the model's own."""
    return isinstance(vars(module).get("_literals"), Literals)


def integers_written(module: torch.nn.Module) -> tuple[int, ...]:
    """Int literals in the module's code; a region of a graph has them among its attributes."""
    return () if is_region(module) else _integers(cast("Any", type(module)))


@lru_cache(maxsize=4096)
def _integers(cls: type) -> tuple[int, ...]:
    codes = [code for function in class_functions(cls) for code in codes_of(function)]
    return tuple(dict.fromkeys(value for code in codes for value in code.co_consts if type(value) is int))


def own_parameters(module: torch.nn.Module, buffers: bool = False) -> dict[str, torch.Tensor]:
    """Parameters (and float buffers, if asked) anywhere inside ``module``, by their path."""
    found = dict(module.named_parameters(remove_duplicate=False))
    if buffers:
        found.update((k, v) for k, v in module.named_buffers(remove_duplicate=False) if v.is_floating_point())
    return found


def only_tensor(captured: Captured) -> tuple[str, Seen] | None:
    """The only tensor argument and its name, or None when there are several or none."""
    tensors = captured.tensors()
    return next(iter(tensors.items())) if len(tensors) == 1 else None


@lru_cache(maxsize=4096)
def float_constants(cls: type) -> tuple[float, ...]:
    """Float literals in the Python code of a module class's methods."""
    found: list[float] = []

    def collect(code: types.CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, float) and math.isfinite(constant):
                found.append(constant)
            elif isinstance(constant, types.CodeType):
                collect(constant)

    for function in class_functions(cls):
        for code in codes_of(function):
            collect(code)
    return tuple(dict.fromkeys(found))


def class_functions(cls: type) -> Iterator[types.FunctionType]:
    """Methods that a module class and its bases below ``nn.Module`` define, ``__init__`` aside."""
    for base in cls.__mro__:
        if base.__name__ == "Module" and base.__module__ == "torch.nn.modules.module" or base is object:
            return
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and name not in (
                "__init__",
                "extra_repr",
                "__repr__",
            ):
                yield function


def attribute_names(cls: type) -> frozenset[str]:
    """Names that the methods of a module class mention: an attribute not among them is never read."""
    return _attribute_names(cls)


@lru_cache(maxsize=4096)
def _attribute_names(cls: type) -> frozenset[str]:
    codes = [code for function in class_functions(cls) for code in codes_of(function)]
    return frozenset().union(*(names_in(code)[1] for code in codes))


def floats(module: torch.nn.Module, low: float, high: float) -> list[tuple[str, float]]:
    """Numbers in ``[low, high]`` that the module holds, as live expressions, without repetition."""
    found: dict[float, str] = {}
    read = names_read(module)
    for name, value in vars(module).items():
        if type(value) in (float, int) and low <= value <= high and name in read:
            found.setdefault(float(value), f"self.{name}")
        elif hasattr(value, "__dict__") and name in read and not name.startswith("_") and not callable(value):
            for inner, number in vars(value).items():
                if type(number) is float and low <= number <= high and inner in read:
                    found.setdefault(number, f"self.{name}.{inner}")
    for number in numbers_written(module):
        if low <= number <= high:
            found.setdefault(number, repr(number))
    return [(text, value) for value, text in found.items()]


def epsilons(module: torch.nn.Module, x: str) -> list[tuple[str, float]]:
    """Candidates for an epsilon: live attributes, literals, the dtype's own, the usual values."""
    found = [(text, value) for text, value in floats(module, 0.0, 0.1) if value > 0.0]
    known = {value for _, value in found}
    found += [(repr(value), value) for value in _USUAL_EPSILONS if value not in known]
    # nn.RMSNorm(eps=None) uses the epsilon of the dtype it accumulates in, float32 for half types
    dtype_epsilon = f"torch.finfo(torch.promote_types({x}.dtype, torch.float32)).eps"
    if any(value is None for name, value in vars(module).items() if "eps" in name):
        return [(dtype_epsilon, 1e-7), *found]
    return [*found, (dtype_epsilon, 1e-7)]


def attribute(path: str) -> str:
    """The expression for a parameter path inside the module (``experts.0.weight`` included)."""
    text = "self"
    for part in path.split("."):
        text += (
            f"[{part}]" if part.isdigit() else f".{part}" if part.isidentifier() else f"._modules[{part!r}]"
        )
    return text


def is_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Seen) and value.shape == shape
