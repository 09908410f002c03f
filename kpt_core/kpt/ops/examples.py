"""Small random inputs and parameters for a proof, shaped like what a site was seen with."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from kpt.ops.binding import Anything, Binding, Hypothesis
from kpt.ops.captured import Captured, Seen
from kpt.ops.clone import clone
from kpt.ops.hypotheses import class_functions

_PRIMITIVES = (bool, int, float, str, type(None), torch.dtype)
#: Elements of parameters above which dimensions are shrunk.
BIG = 1 << 18
_LEAST = 32  # a table of positions keeps more rows than a small sequence has
_ENOUGH = 1 << 12  # rows of a table are no better proof than that
_MOST = 1 << 16  # elements of an input with another length
_LARGE_SIZE = 16  # sizes of the call (batch, length) above this are made small
_CONSTRUCTORS = frozenset({"__init__", "__post_init__"})  # what has made an object at hand is over


class Examples:
    """Draws inputs for one captured site, and copies of its module with random parameters."""

    def __init__(self, captured: Captured, shrink: bool = True, straight: bool = False) -> None:
        self.captured = captured
        module = captured.module
        seen = [value for call in captured.calls for value in _seen(call)]
        devices = {value.device for value in seen if value.dtype.is_floating_point} or {torch.device("cpu")}
        device = next(iter(devices))
        # MPS has no float64. Integers that a wrong hypothesis takes for indices raise on a CPU; on an
        # accelerator they may end the process's use of the device.
        indices = any(_is_integer(value.dtype) for value in seen)
        self.device = torch.device("cpu") if indices or device.type in ("mps", "meta") else device
        self.generator = torch.Generator(device="cpu").manual_seed(0x5EED)
        self.function_of_module = captured.function is not None
        self.protected = _own_sizes(captured)
        parameters = list(module.parameters())
        self.of_parameters = {size for p in parameters for size in p.shape}
        elements = sum(p.numel() for p in parameters)
        self.sizes: dict[int, int] = {}
        if shrink and not self.function_of_module and elements > BIG:
            self.sizes = shrunk({d for p in parameters for d in p.shape if d > 64})
        #: Sizes that are lengths somewhere: as a last dimension (of a mask) they change along
        self.shared = {size for value in seen for size in value.shape[1:-1]}
        self.lengths = {} if straight else self._small_lengths(seen)
        #: Ends of the ranges of integer arguments that may count what was shrunk (rows of a table).
        self.limits: dict[str, set[int]] = {}

    def within(self, high: int) -> int:
        """A limit of integers, in the copy's own size."""
        return self.sizes.get(high, high)

    def _small_lengths(self, seen: list[Seen]) -> dict[int, int]:
        """Smaller values for sizes that belong to the call; distinct sizes stay distinct."""
        found: dict[int, int] = {}
        fresh = iter(range(8, 4096, 4))  # even, because features come in pairs
        for value in seen:
            for size in _lengths(value):
                if size > _LARGE_SIZE and size not in self.protected and size not in found:
                    found[size] = next(n for n in fresh if n not in self.protected)
        return found

    # ---- parameters ---------------------------------------------------------------------------

    @property
    def mixed(self) -> bool:
        """Whether parameters and inputs come in several float dtypes."""
        held = [t.dtype for t in self.captured.module.parameters() if t.is_floating_point()]
        given = [seen.dtype for seen in _seen(self.captured.calls[0]) if seen.dtype.is_floating_point]
        return not self.function_of_module and len({*held, *given}) > 1

    def twin(self, dtype: torch.dtype | None) -> torch.nn.Module:
        """A copy of the module with random parameters of ``dtype``, or each of its own dtype."""
        own = torch.Generator(device="cpu").manual_seed(0xC0DE)

        def tensor(value: torch.Tensor, is_parameter: bool) -> torch.Tensor:
            shape = tuple(self.sizes.get(size, size) for size in value.shape)
            if not value.is_floating_point():
                kept = value.detach().clone().to(self.device)
                return torch.nn.Parameter(kept, False) if is_parameter else kept
            if self.function_of_module and value.numel() > 1 << 16:
                # a function given its caller has no business with large weights: reading one fails
                drawn = torch.empty(shape, dtype=dtype, device="meta")
                return torch.nn.Parameter(drawn, False) if is_parameter else drawn
            drawn = torch.randn(shape, generator=own, dtype=torch.float64)
            if not is_parameter:
                drawn = drawn.abs() + 0.5
            elif len(shape) > 1:
                drawn = drawn / math.sqrt(max(shape[-1], 1))
            else:
                drawn = 0.5 * drawn + 0.3
            drawn = drawn.to(self.device, dtype or value.dtype)
            return torch.nn.Parameter(drawn) if is_parameter else drawn

        def attribute(value: Any) -> Any:
            if type(value) is int:
                return self.sizes.get(value, value)
            if type(value) is tuple:
                return tuple(self.sizes.get(v, v) if type(v) is int else v for v in value)
            return value

        twin = clone(self.captured.module, tensor, attribute if self.sizes else None)
        return twin

    # ---- inputs -------------------------------------------------------------------------------

    def draw(
        self,
        index: int,
        twin: torch.nn.Module,
        *,
        scale: float = 1.0,
        dtype: torch.dtype | None = torch.float64,
        strided: bool = False,
        lengths: dict[int, int] | None = None,
    ) -> dict[str, Any]:
        """Arguments like those of call ``index``, by parameter name."""
        table = {**self.lengths, **(lengths or {})}

        def make(value: Any) -> Any:
            if isinstance(value, Seen):
                return self._tensor(value, scale, dtype, strided, table)
            if type(value) in (tuple, list):
                return type(value)(make(item) for item in value)
            if type(value) is dict:
                return {key: make(item) for key, item in value.items()}
            return twin if isinstance(value, torch.nn.Module) else value

        drawn = {name: make(value) for name, value in self.captured.calls[index].items()}
        for name, limits in self.limits.items() if self.sizes else ():
            value = drawn.get(name)
            if isinstance(value, torch.Tensor) and value.numel():
                drawn[name] = self._inside(value, limits)
        return drawn

    def _inside(self, values: torch.Tensor, limits: set[int]) -> torch.Tensor:
        """Numbers that count rows of any table that is large enough for them, as rows of its smaller copy."""
        fitting = [high for high in limits if high > int(values.max())]
        smallest = min((self.within(high) for high in fitting), default=0)
        # What is negative marks something, and stays.
        return torch.where(values >= 0, values % smallest, values) if smallest else values

    def _tensor(
        self,
        seen: Seen,
        scale: float,
        dtype: torch.dtype | None,
        strided: bool,
        table: dict[int, int],
    ) -> torch.Tensor:
        shape = self._shape(seen, table)
        if seen.dtype.is_complex:
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.complex128)
            return drawn.to(self.device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        if not seen.dtype.is_floating_point:
            return self._integers(seen, shape)
        if strided and len(shape) > 1:
            drawn = torch.randn(
                *shape[:-2], shape[-1], shape[-2], generator=self.generator, dtype=torch.float64
            )
            drawn = drawn.transpose(-1, -2)
        else:
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (drawn * scale).to(self.device, dtype or seen.dtype)

    def _shape(self, seen: Seen, table: dict[int, int]) -> tuple[int, ...]:
        last = len(_lengths(seen))
        return tuple(
            self.sizes.get(size, table.get(size, size) if axis != last or size in self.shared else size)
            for axis, size in enumerate(seen.shape)
        )

    def _integers(self, seen: Seen, shape: tuple[int, ...]) -> torch.Tensor:
        """Resampled from the values seen; the very same values when the shape did not change."""
        value = seen.value
        if value is None:
            raise ValueError("an integer tensor too large to be remembered cannot be drawn")
        value = value.to(self.device)
        if tuple(value.shape) == shape:
            return value.clone()
        if value.numel() == 0:
            return value.new_zeros(shape)
        picks = torch.randint(0, value.numel(), shape, generator=self.generator)
        return value.flatten()[picks.to(self.device)]

    def variations(
        self, twin: torch.nn.Module, integers: tuple[int, ...]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The first call with other batch sizes and lengths: one, odd, around literals in the code."""
        call = self.captured.calls[0]
        sizes = {size for value in _seen(call) for size in _lengths(value)}
        free = [size for size in sizes if size not in self.protected] or list(sizes)
        held = {v for v in vars(self.captured.module).values() if type(v) is int and 3 < v <= 8192}
        literals = sorted({*integers, *(held - sizes - self.of_parameters)} - {1, 2, 3})[:8]
        wanted = [1, 2, 3, 33]
        for literal in literals:
            wanted += [literal, literal + 1] if literal > 32 else [literal]
        for size in sorted(free, reverse=True)[:3]:
            for length in dict.fromkeys(wanted):
                if length != size and self._affordable(call, {size: length}):
                    try:
                        bound = self.draw(0, twin, lengths={size: length})
                    except (RuntimeError, ValueError):
                        continue  # an integer input that cannot be drawn in this size
                    yield f"with a size of {length} in place of {size}", bound

        if self.function_of_module:
            # queries and keys have lengths of their own
            name, seen = next(((n, v) for n, v in call.items() if isinstance(v, Seen)), ("", None))
            # a mask would no longer fit to fewer queries
            if seen is not None and len(seen.shape) > 2 and len(list(_seen(call))) == 3:
                for length in (1, 2):
                    bound = self.draw(0, twin)
                    other = Seen(
                        (*seen.shape[:-2], length, seen.shape[-1]), seen.dtype, (), seen.device, seen.value
                    )
                    bound[name] = self._tensor(other, 1.0, torch.float64, False, self.lengths)
                    yield f"with {length} rows of {name}", bound

    def integer_draws(
        self, name: str, low: int, high: int, literals: tuple[int, ...]
    ) -> Iterator[torch.Tensor]:
        """Tensors for an integer argument that together cover ``[low, high)``, its ends if it is long.

        Then one for each value that the code or the module mentions, and for the usual markers of
        positions to ignore, mixed with ordinary values.
        """
        seen = self.captured.calls[0][name]
        shape = self._shape(seen, self.lengths)
        room = max(math.prod(shape), 1)
        covered = list(range(low, high))
        if len(covered) > 512:
            covered = [*covered[:128], *covered[-128:]]
        mixed = torch.tensor(covered)[torch.randperm(len(covered), generator=self.generator)]
        for start in range(0, len(covered), room):
            picks = torch.arange(start, start + room) % len(covered)
            yield mixed[picks].view(shape).to(self.device, seen.dtype)
        module = self.captured.module
        held = {v for inner in module.modules() for v in vars(inner).values() if type(v) is int}
        config = vars(getattr(module, "config", None) or object) if hasattr(module, "config") else {}
        held.update(v for v in config.values() if type(v) is int)
        for special in sorted({-100, -1, *literals, *held}):
            picks = torch.randint(0, len(covered), (room,), generator=self.generator)
            values = mixed[picks]
            values[: (room + 1) // 2] = special
            yield values.view(shape).to(self.device, seen.dtype)

    def _affordable(self, call: dict[str, Any], lengths: dict[int, int]) -> bool:
        """Whether inputs with other lengths stay small; functions may take the square of one."""
        table = {**self.lengths, **lengths}
        elements = max((math.prod(self._shape(seen, table)) for seen in _seen(call)), default=0)
        longest = max(lengths.values())
        return elements <= _MOST and (not self.function_of_module or elements * longest <= 16 * _MOST)

    # ---- arguments that are not tensors --------------------------------------------------------

    def constants(self, hypothesis: Hypothesis) -> dict[str, Any]:
        """What a call has to share with those of the proof, by parameter name.

        The plain values that ``hypothesis`` does not read, where all calls agreed; `Anything` for an
        optional tensor that was always given; for ``**kwargs``, the keywords with their values.
        """
        texts = (
            *hypothesis.values.values(),
            *hypothesis.arguments.values(),
            *hypothesis.conditions,
            hypothesis.output,
        )
        read = {name for text in texts for name in compile(text, "<hypothesis>", "eval").co_names}
        calls = self.captured.calls
        found: dict[str, Any] = {}
        for name, parameter in self.captured.signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL or name not in calls[0]:
                continue
            values = [call.get(name) for call in calls]
            if parameter.kind is parameter.VAR_KEYWORD:
                found[name] = _keywords(values)
            elif all(isinstance(value, Seen) for value in values):
                if parameter.default is None:
                    found[name] = Anything
            elif name not in read and all(_plain_and_equal(value, values[0]) for value in values):
                found[name] = values[0]
        return found

    def other_values(
        self, twin: torch.nn.Module, candidates: Sequence[tuple[Hypothesis, Binding]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Calls with other values for the numbers that a hypothesis passes on."""
        pinned = [binding.constants for _, binding in candidates]
        for name, value in self.captured.calls[0].items():
            read = not all(name in constants for constants in pinned)
            if type(value) is float and read:
                bound = self.draw(0, twin)
                bound[name] = value * 0.625 + 0.03125
                yield f"with another {name}", bound
            elif type(value) is int and read:
                bound = self.draw(0, twin)
                bound[name] = value - 1
                yield f"with {name}={value - 1}", bound
            elif type(value) is bool and read:
                bound = self.draw(0, twin)
                bound[name] = not value
                yield f"with {name}={not value}", bound
            elif self.captured.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD and value:
                bound = self.draw(0, twin)
                bound[name] = {}
                yield f"without **{name}", bound


def _lengths(seen: Seen) -> tuple[int, ...]:
    """The sizes that a call may choose: the last axis is features, except that of labels or tokens."""
    return seen.shape if _is_integer(seen.dtype) else seen.shape[:-1]


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _seen(value: Any) -> Iterator[Seen]:
    if isinstance(value, Seen):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _seen(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _seen(item)


def _plain_and_equal(value: Any, other: Any) -> bool:
    return isinstance(value, _PRIMITIVES) and type(value) is type(other) and value == other


def _keywords(calls: Sequence[Any]) -> dict[str, Any]:
    """Keywords that were passed on, with the value if it was plain and always the same."""
    found: dict[str, Any] = {}
    for call in calls:
        for key, value in (call or {}).items():
            same = isinstance(value, _PRIMITIVES) and found.get(key, value) == value
            found[key] = value if same else Anything
    return found


def _own_sizes(captured: Captured) -> set[int]:
    """Sizes that belong to the module: of its parameters, and integers that it or its config holds.

    A config holds much that this module never looks at. A sequence as long as the longest that the model
    takes is like any other to code that does not know of that limit, and costs its square to prove.
    """
    module = captured.module
    found = {size for p in (*module.parameters(), *module.buffers()) for size in p.shape}
    configs: list[dict[str, Any]] = []
    for inner in module.modules():
        for value in vars(inner).values():
            if type(value) is int:
                found.add(value)
            elif hasattr(value, "__dict__") and not callable(value):
                configs.append(vars(value))
    methods = [function for cls in {type(m) for m in module.modules()} for function in class_functions(cls)]
    held = [
        value for inner in module.modules() for value in vars(inner).values() if hasattr(value, "__dict__")
    ]
    read = _names_read([*methods, *held, captured.function], held)
    sequences = _sequences(captured) if captured.function is not None else set()
    for config in configs:
        numbers = {name: value for name, value in config.items() if type(value) is int}
        found.update(value for name, value in numbers.items() if name in read or value not in sequences)
    return found


def _sequences(captured: Captured) -> set[int]:
    """Lengths of the sequences in (batch, heads, length, features) where nothing else is of that size."""
    shapes = [seen.shape for call in captured.calls for seen in _seen(call) if seen.dtype.is_floating_point]
    four = [shape for shape in shapes if len(shape) == 4]
    others = {size for shape in four for size in (*shape[:2], shape[-1])}
    return {shape[2] for shape in four} - others


def _names_read(functions: Iterable[Any], held: Iterable[Any]) -> set[str]:
    """Names that the code of ``functions`` mentions, and that of what it may call.

    That is what it reaches by names: functions among its globals, in modules or tables there, or imported by
    itself, methods of classes and objects there, of its own class, and of the objects that the modules have
    in ``held``. Constructors count by their own code alone: a class is named to be called, but also to be
    compared with.
    """
    names: set[str] = set()
    constructed: set[str] = set()
    seen: set[tuple[types.FunctionType, type | None]] = set()
    holding = {type(value) for value in held}
    pending: list[tuple[Any, type | None]] = [(value, None) for value in (*functions, *held)]
    while pending:
        value, owner = pending.pop()
        function = _python_function(value)
        if function is None or (function, owner) in seen or _indifferent(function.__module__):
            continue
        seen.add((function, owner))
        called, mentioned = _mentions(function.__code__)
        new = mentioned - names
        names |= mentioned
        pending += [(cell.cell_contents, owner) for cell in function.__closure__ or () if not _is_empty(cell)]
        for other in _reached(function.__globals__, called):
            own = other if isinstance(other, type) else type(other)
            pending += [(other, None), *_methods_of(own, called - _CONSTRUCTORS | {"__call__"})]
            if own is other:
                for constructor, _ in _methods_of(own, _CONSTRUCTORS):
                    constructed |= _mentions(constructor.__code__)[1]
        if owner is not None:
            pending += _methods_of(owner, called - _CONSTRUCTORS)
        for own in holding if new else ():
            pending += _methods_of(own, new - _CONSTRUCTORS | {"__call__"})
    return names | constructed


def _mentions(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names in ``code`` and in the code inside it, and these with all strings."""
    names, strings = set(code.co_names), set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner, more = _mentions(constant)
            names |= inner
            strings |= more
        elif isinstance(constant, str):  # getattr(config, "name", ...)
            strings.add(constant)
    return names, names | strings


def _reached(scope: Mapping[str, Any], names: set[str]) -> list[Any]:
    """What ``names`` lead to from the globals ``scope``, through modules, and functions in tables there."""
    found: list[Any] = []
    packages: set[int] = set()
    level = [scope[name] if name in scope else sys.modules.get(name) for name in names]
    while level:
        value = level.pop()
        if not isinstance(value, types.ModuleType):
            found.append(value)
            if isinstance(value, dict):  # a lazy one may import much when it is asked
                found += [entry for entry in dict.values(value) if _python_function(entry) is not None]
        elif id(value) not in packages and not _indifferent(value.__name__):
            packages.add(id(value))
            level += [vars(value)[name] for name in names if name in vars(value)]
    return found


def _methods_of(owner: type, names: Set[str]) -> Iterator[tuple[types.FunctionType, type]]:
    """The methods and properties of a class and its bases that are among ``names``, with the class."""
    if issubclass(owner, torch.autograd.Function):
        names = names | {"forward"}  # which `apply` calls
    for base in owner.__mro__:
        for name in () if _indifferent(base.__module__) else names & vars(base).keys():
            member = vars(base)[name]
            function = member.fget if isinstance(member, property) else member
            function = _python_function(getattr(function, "__func__", function))
            if function is not None:
                yield function, owner


def _python_function(value: Any) -> types.FunctionType | None:
    """The function behind a bound method, a partial function, or itself; None for anything else."""
    while isinstance(value, (types.MethodType, functools.partial)):
        value = value.__func__ if isinstance(value, types.MethodType) else value.func
    return value if isinstance(value, types.FunctionType) else None


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _indifferent(module: str | None) -> bool:
    """Whether code of ``module`` knows nobody's config: that of torch and of Python's own library."""
    package = (module or "").partition(".")[0]
    return package in ("torch", "numpy") or package in sys.stdlib_module_names


def shrunk(sizes: set[int]) -> dict[int, int]:
    """Smaller sizes in the same proportions, so that fused and split matrices still fit each other."""
    for factor in (64, 32, 16, 8, 4, 2):
        if all(size % factor == 0 and _LEAST <= size // factor <= _ENOUGH for size in sizes):
            return {size: size // factor for size in sizes}
    found: dict[int, int] = {}
    fresh = iter(range(_LEAST + 1, 4096, 2))
    for size in sorted(sizes):
        half = size // 2
        found[size] = 2 * found[half] if size % 2 == 0 and half in found else next(fresh)
    return found
