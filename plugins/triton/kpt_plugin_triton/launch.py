"""Start a Triton kernel with little more than the driver's own cost.

``JITFunction.__getitem__`` binds names, hashes options and formats a key on every call, about 10 µs.
`Kernel` does that once for each kind of call and afterwards goes straight to the compiled kernel's own
entry. Kernels started this way keep two rules: run-time arguments come first and compile-time
constants last, and both are passed by position.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

#: Whether kernels run in Triton's interpreter, on CPU tensors, instead of being compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of run."""

    function: Any
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int


@dataclass
class Recording:
    """Launches of a planned architecture, see `recording`."""

    architecture: str
    processors: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None
#: Whether a call does something else than launch: interpret, or record.
_indirect = INTERPRETED


@contextlib.contextmanager
def recording(architecture: str, processors: int = 132) -> Iterator[Recording]:
    """Inside, kernels called on meta tensors are recorded with the options that ``architecture`` would get.

    For ahead-of-time compilation and its tests; not for use by several threads at once.
    """
    global _recording, _indirect
    before = _recording
    _recording = Recording(architecture, processors)
    _indirect = True
    try:
        yield _recording
    finally:
        _recording = before
        _indirect = INTERPRETED or before is not None


def is_recording() -> bool:
    return _recording is not None


_current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else None
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Kernel:
    """A ``triton.jit`` function that is launched without the JIT's lookup.

    A call is ``kernel(grid, arguments, constants, num_warps, num_stages)``: ``grid`` is three program
    counts, ``arguments`` the run-time arguments (tensors, numbers or None) and ``constants`` the values
    of the ``tl.constexpr`` parameters after them. The launch is on the current stream of the first tensor's
    device. An argument is a tensor (or None) in every call, or a number in every call.

    Args:
        overlapped: the kernel waits for the one before it by itself where `overlaps` says so, and is started
            while that one still runs.
    """

    def __init__(self, function: Any, overlapped: bool = False) -> None:
        self.function = function
        self.overlapped = overlapped
        self._ready: dict[Any, tuple[Any, Any, tuple[Any, ...]]] = {}
        self._start: Callable[..., Any] | None = None
        functools.update_wrapper(self, function.fn)

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> tuple[Any, Any, tuple[Any, ...]] | None:
        """Launch, and return what did it (see `_entry`); None where nothing compiled was launched here."""
        if _indirect:
            self._run_elsewhere(grid, arguments, constants, num_warps, num_stages)
            return None
        start = self._start
        if start is None:
            start = self._start = _written_out(arguments)
        return start(self, grid, arguments, constants, num_warps, num_stages)

    def _run_elsewhere(
        self, grid: Any, arguments: Any, constants: Any, num_warps: int, num_stages: int
    ) -> None:
        if _recording is not None:
            _recording.launches.append(Launch(self.function, arguments, constants, num_warps, num_stages))
        else:
            self.function[grid](*arguments, *constants)

    def _on_device(self, device: int, *call: Any) -> None:
        with torch.cuda.device(device):
            self(*call)

    def _prepare(
        self,
        key: Any,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        early = {"launch_pdl": True} if self.overlapped and overlaps(_first(arguments).device.index) else {}
        compiled = self.function.warmup(
            *arguments, *constants, grid=grid, num_warps=num_warps, num_stages=num_stages, **early
        )
        if hasattr(compiled, "result"):  # compiled in the background
            compiled = compiled.result()
        found = self._ready[key] = _entry(compiled)
        return found


def _entry(compiled: Any) -> tuple[Callable[..., None], Any, tuple[Any, ...]]:
    """What starts a compiled kernel, its handle, and what comes between that and the arguments.

    The launcher of Triton 3.6 for CUDA is a Python method around a C function. It only has work to do where a
    kernel asks for scratch memory: without, the C function is called itself.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    hooks = (None, None, None)
    direct = (
        triton.__version__.startswith("3.6.")
        and type(run).__name__ == "CudaLauncher"
        and run.global_scratch_size == 0
        and run.profile_scratch_size == 0
    )
    if direct:
        scratch = (None, None)
        return run.launch, function, (run.launch_cooperative_grid, run.launch_pdl, *scratch, metadata, *hooks)
    return run, function, (metadata, *hooks)


def _first(arguments: tuple[Any, ...]) -> torch.Tensor:
    return next(value for value in arguments if isinstance(value, torch.Tensor))


def _written_out(arguments: tuple[Any, ...]) -> Callable[..., None]:
    """The launch written out for a kernel's arguments: a loop over them would cost more than the launch.

    The key holds what Triton compiles differently for: dtypes, whether addresses are multiples of 16,
    and integers that are one, multiples of 16 or wider than 32 bits.
    """
    names = [f"a{i}" for i in range(len(arguments))]
    tensors = [n for n, value in zip(names, arguments) if value is None or isinstance(value, torch.Tensor)]
    integers = [n for n, value in zip(names, arguments) if type(value) is int]
    present = " else ".join([*(f"{name} if {name} is not None" for name in tensors[:-1]), tensors[-1]])
    lines = [
        "def start(kernel, grid, arguments, constants, num_warps, num_stages):",
        f"    {', '.join(names)}, = arguments",
        f"    device = ({present}).device.index",
        "    if device != current_device():",
        "        return kernel._on_device(device, grid, arguments, constants, num_warps, num_stages)",
    ]
    key = ["device", "num_warps", "num_stages", "constants"]
    for name in tensors:
        lines.append(f"    if {name} is None: p{name} = t{name} = None")
        lines.append(f"    else: p{name} = {name}.data_ptr(); t{name} = {name}.dtype, p{name} & 15 == 0")
        key.append(f"t{name}")
    for name in integers:
        key += [f"{name} & 15 == 0", f"{name} == 1", f"-0x80000000 <= {name} <= 0x7fffffff"]
    passed = [f"p{name}" if name in tensors else name for name in names]
    lines += [
        f"    key = ({', '.join(key)})",
        "    found = kernel._ready.get(key)",
        "    if found is None:",
        "        found = kernel._prepare(key, grid, arguments, constants, num_warps, num_stages)",
        "    run, function, between = found",
        "    run(*grid, stream_of(device), function, *between,",
        f"        {', '.join(passed)}, *constants)",
        "    return found",
    ]
    return _defined(lines, "start")


def _defined(lines: list[str], name: str) -> Callable[..., Any]:
    """The function that ``lines`` define; nothing but names of this module goes into them."""
    scope: dict[str, Any] = {"current_device": _current_device, "stream_of": _stream_of}
    exec("\n".join(lines), scope)
    return scope[name]  # type: ignore[no-any-return]


class Bound:
    """A launch but for its run-time arguments: ``bound.start(*arguments)``.

    From the second call on it takes half the time of the kernel's own call, for arguments like those of the
    first: of the same dtypes and numbers, None in the same places, on the same device and at addresses that
    are multiples of 16. Any others go through the kernel's own call.
    """

    __slots__ = ("constants", "grid", "kernel", "num_stages", "num_warps", "start")

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.constants = constants
        self.num_warps = num_warps
        self.num_stages = num_stages
        self.start: Callable[..., None] = self._first

    def _first(self, *arguments: Any) -> None:
        found = self._otherwise(*arguments)
        if found is not None:
            self.start = self._like(arguments, found)

    def _otherwise(self, *arguments: Any) -> tuple[Any, Any, tuple[Any, ...]] | None:
        return self.kernel(self.grid, arguments, self.constants, self.num_warps, self.num_stages)

    def _like(
        self, arguments: tuple[Any, ...], found: tuple[Any, Any, tuple[Any, ...]]
    ) -> Callable[..., None]:
        kinds = "".join(map(_kind, arguments))
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        if any(value.data_ptr() & 15 for value in tensors):
            return self._first  # compiled for such addresses, which the next ones need not be
        expected = tuple(value.dtype if isinstance(value, torch.Tensor) else value for value in arguments)
        made = _maker(kinds, len(found[2]), len(self.constants))
        return made(  # type: ignore[no-any-return]
            self._otherwise, tensors[0].device.index, expected, self.grid, *found, self.constants
        )


def _kind(argument: Any) -> str:
    """A tensor, nothing, or a number."""
    return "-" if argument is None else "t" if isinstance(argument, torch.Tensor) else "n"


@functools.lru_cache(maxsize=1024)
def _maker(kinds: str, between: int, constants: int) -> Callable[..., Callable[..., None]]:
    """What makes `Bound.start` for arguments of such kinds: written out once for all sizes."""
    names = [f"a{i}" for i in range(len(kinds))]
    tensors = [name for name, kind in zip(names, kinds) if kind == "t"]
    absent = [name for name, kind in zip(names, kinds) if kind == "-"]
    given = [f"{n}.dtype" if kind == "t" else n for n, kind in zip(names, kinds)]
    before = [f"b{i}" for i in range(between)]
    after = [f"c{i}" for i in range(constants)]
    lines = [
        "def make(otherwise, device, expected, grid, run, function, before, after):",
        "    x, y, z = grid",
        *([f"    {', '.join(before)}, = before"] if before else []),
        *([f"    {', '.join(after)}, = after"] if after else []),
        f"    def start({', '.join(names)}):",
        f"        if {' or '.join(f'{name} is None' for name in tensors)}:",
        f"            return otherwise({', '.join(names)})",
    ]
    for name in tensors:
        lines.append(f"        p{name} = {name}.data_ptr()")
    unlike = [
        f"({' | '.join(f'p{name}' for name in tensors)}) & 15",
        "current_device() != device",
        *(f"{name} is not None" for name in absent),
        f"({', '.join(given)},) != expected",
    ]
    passed = [f"p{name}" if kind == "t" else name for name, kind in zip(names, kinds)]
    lines += [
        f"        if {' or '.join(unlike)}:",
        f"            return otherwise({', '.join(names)})",
        f"        run(x, y, z, stream_of(device), function, {', '.join([*before, *passed, *after])})",
        "    return start",
    ]
    return _defined(lines, "make")


def architecture(device: int | None) -> str:
    """The name of a device's instruction set, ``sm_90`` or ``gfx942``; ``interpreter`` without a device."""
    if _recording is not None:
        return _recording.architecture
    if INTERPRETED or device is None:
        return "interpreter"
    return _architecture(device)


@functools.cache
def _architecture(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def chip() -> int:
    """90 for sm_90, 0 for what is not NVIDIA's."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    name = architecture(index)
    return int(name[3:]) if name.startswith("sm_") else 0


def overlaps(device: int | None) -> bool:
    """Whether kernels can be started there while the one before them still runs, and wait by themselves."""
    name = architecture(device)
    return name.startswith("sm_") and int(name[3:]) >= 90


def processors(device: int | None) -> int:
    """The number of multiprocessors (compute units) of a device; 4 for the interpreter."""
    if _recording is not None:
        return _recording.processors
    if INTERPRETED or device is None:
        return 4
    return _processors(device)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 if size <= 1 else 1 << (size - 1).bit_length()


def ceil_div(size: int, block: int) -> int:
    return -(-size // block)


def version() -> str:
    return str(triton.__version__)
