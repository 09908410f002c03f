"""Small random inputs and parameters for a proof, shaped like what a site was seen with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kpt.ops.binding import Binding, Hypothesis
from kpt.ops.captured import Captured, Seen, seen_in
from kpt.ops.clone import clone
from kpt.ops.sizes import BIG, is_integer, own_sizes, shrunk, sizes_of_call

_MOST = 1 << 16  # elements of an input with another length
_LARGE_SIZE = 16  # sizes of the call (batch, length) above this are made small


class Examples:
    """Draws inputs for one captured site, and copies of its module with random parameters."""

    def __init__(self, captured: Captured, shrink: bool = True, straight: bool = False) -> None:
        self.captured = captured
        module = captured.module
        seen = [value for call in captured.calls for value in seen_in(call)]
        devices = {value.device for value in seen if value.dtype.is_floating_point} or {torch.device("cpu")}
        device = next(iter(devices))
        # MPS has no float64. Integers that a wrong hypothesis takes for indices raise on a CPU; on an
        # accelerator they may end the process's use of the device.
        indices = any(is_integer(value.dtype) for value in seen)
        self.device = torch.device("cpu") if indices or device.type in ("mps", "meta") else device
        self.generator = torch.Generator(device="cpu").manual_seed(0x5EED)
        self.function_of_module = captured.function is not None
        self.protected = own_sizes(captured)
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
            for size in sizes_of_call(value):
                if size > _LARGE_SIZE and size not in self.protected and size not in found:
                    found[size] = next(n for n in fresh if n not in self.protected)
        return found

    # ---- parameters ---------------------------------------------------------------------------

    @property
    def mixed(self) -> bool:
        """Whether parameters and inputs come in several float dtypes."""
        held = [t.dtype for t in self.captured.module.parameters() if t.is_floating_point()]
        given = [seen.dtype for seen in seen_in(self.captured.calls[0]) if seen.dtype.is_floating_point]
        return not self.function_of_module and len({*held, *given}) > 1

    def twin(self, dtype: torch.dtype | None) -> torch.nn.Module:
        """A copy of the module with random parameters of ``dtype``, or each of its own dtype."""
        own = torch.Generator(device="cpu").manual_seed(0xC0DE)

        def tensor(value: torch.Tensor, is_parameter: bool) -> torch.Tensor:
            shape = tuple(self.sizes.get(size, size) for size in value.shape)
            if not value.is_floating_point() or value.layout is not torch.strided:
                # of a sparse matrix as many numbers as it has places would be drawn
                kept = value.detach().clone().to(self.device)
                if value.is_floating_point() and dtype is not None:
                    kept = kept.to(dtype)
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
        last = len(sizes_of_call(seen))
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
        sizes = {size for value in seen_in(call) for size in sizes_of_call(value)}
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
            if seen is not None and len(seen.shape) > 2 and len(list(seen_in(call))) == 3:
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
        elements = max((math.prod(self._shape(seen, table)) for seen in seen_in(call)), default=0)
        longest = max(lengths.values())
        return elements <= _MOST and (not self.function_of_module or elements * longest <= 16 * _MOST)

    # ---- arguments that are not tensors --------------------------------------------------------

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
