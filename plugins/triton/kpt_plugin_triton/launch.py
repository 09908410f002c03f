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
from collections.abc import Iterator
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


@contextlib.contextmanager
def recording(architecture: str, processors: int = 132) -> Iterator[Recording]:
    """Inside, kernels called on meta tensors are recorded with the options that ``architecture`` would get.

    For ahead-of-time compilation and its tests; not for use by several threads at once.
    """
    global _recording
    before = _recording
    _recording = Recording(architecture, processors)
    try:
        yield _recording
    finally:
        _recording = before


def is_recording() -> bool:
    return _recording is not None


_current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else None
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Kernel:
    """A ``triton.jit`` function that is launched without the JIT's lookup.

    A call is ``kernel(grid, arguments, constants, num_warps, num_stages)``: ``grid`` is three program
    counts, ``arguments`` the run-time arguments (tensors, numbers or None) and ``constants`` the values
    of the ``tl.constexpr`` parameters after them. The launch is on the current stream of
    ``arguments[0]``'s device.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._ready: dict[Any, tuple[Any, Any, Any]] = {}
        functools.update_wrapper(self, function.fn)

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        if INTERPRETED or _recording is not None:
            if _recording is not None:
                launch = Launch(self.function, arguments, constants, num_warps, num_stages)
                _recording.launches.append(launch)
            else:
                self.function[grid](*arguments, *constants)
            return
        device = arguments[0].device.index
        if device != _current_device():  # type: ignore[misc]
            with torch.cuda.device(device):
                self(grid, arguments, constants, num_warps, num_stages)
            return
        key: list[Any] = [device, num_warps, num_stages, constants]
        values: list[Any] = []
        for value in arguments:
            if isinstance(value, torch.Tensor):
                address = value.data_ptr()
                key.append(value.dtype)
                key.append(address & 15 == 0)
                values.append(address)
            else:
                values.append(value)
                if type(value) is int:
                    # what Triton specialises on: one, multiples of 16, and 64-bit values
                    key.append(1 if value == 1 else (value & 15 == 0, -0x80000000 <= value <= 0x7FFFFFFF))
                else:
                    key.append(None if value is None else type(value))
        found = self._ready.get(tuple(key))
        if found is None:
            found = self._prepare(grid, arguments, constants, num_warps, num_stages)
            self._ready[tuple(key)] = found
        run, function, metadata = found
        run(
            *grid,
            _stream_of(device),  # type: ignore[misc]
            function,
            metadata,
            None,
            None,
            None,
            *values,
            *constants,
        )

    def _prepare(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
        num_stages: int,
    ) -> tuple[Any, Any, Any]:
        compiled = self.function.warmup(
            *arguments, *constants, grid=grid, num_warps=num_warps, num_stages=num_stages
        )
        if hasattr(compiled, "result"):  # compiled in the background
            compiled = compiled.result()
        return compiled.run, compiled.function, compiled.packed_metadata


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
