"""Compile kernels ahead of time for GPUs that are not here, and read what the compiler made of them."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kpt_plugin_triton.launch import Launch

#: The architectures that every kernel is compiled for, with the shared memory (LDS) of one program in bytes.
TARGETS: dict[str, tuple[GPUTarget, int]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65_536),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163_840),
}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2fnuz: "fp8e5b16",
}
#: Triton's operations that multiply tiles, in the last form before LLVM's, with the types of their operands.
_PRODUCT = re.compile(
    r"\b(?P<op>tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\s.*?"
    r"(?:tensor|memdesc)<(?P<rows>\d+)x(?P<depth>\d+)x(?P<dtype>\w+),.*?"
    r"(?:tensor|memdesc)<\d+x(?P<columns>\d+)x\w+,.*?"
    r"(?:-> tensor<[\dx]+\w+, #(?P<layout>\w+)>|$)"
)
#: Where tiles of such a layout are multiplied.
_UNITS = {"nvidia_mma": "mma", "amd_mfma": "mfma"}
#: Instructions of matrix units by what the disassembly calls them.
_MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+|v_smfmac_\w+)")


@dataclass(frozen=True)
class Product:
    """One product of tiles in a kernel's code, [rows, depth] times [depth, columns] of ``dtype``.

    ``unit`` is what multiplies them: ``wgmma``, ``tcgen05``, ``mma`` (a warp's), ``mfma``, or ``none`` where
    that is left to ordinary arithmetic.
    """

    unit: str
    rows: int
    columns: int
    depth: int
    dtype: str

    @property
    def bytes(self) -> int:
        """The width of one element."""
        digits = re.search(r"\d+", self.dtype)
        return max(int(digits[0]) // 8, 1) if digits else 1

    def __str__(self) -> str:
        return f"{self.rows}x{self.depth} times {self.depth}x{self.columns} of {self.dtype} on {self.unit}"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: bytes of shared memory, registers and spills, matrix instructions by
    kind, and the products that they are for.
    """

    name: str
    target: str
    shared: int
    registers: int
    spilled: int
    matrix: dict[str, int]
    products: tuple[Product, ...] = ()


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile a recorded launch for one of `TARGETS`; addresses count as aligned to 16 bytes.

    Raises:
        triton.CompilationError: the kernel does not compile for that target.
    """
    return resources(compile_for(launch, target_of(target)), target)


def target_of(architecture: str) -> GPUTarget:
    """Triton's target for an architecture by name; raises ValueError for a name of another form."""
    if architecture in TARGETS:
        return TARGETS[architecture][0]
    if re.fullmatch(r"sm_\d+", architecture):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", architecture):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise ValueError(f"architecture is {architecture!r}; supported: sm_<number> or gfx<number>")


def compile_for(launch: Launch, gpu: GPUTarget) -> Any:
    """Compile a launch, whose tensors may stand there as dtypes; fills Triton's cache on disk."""
    parameters = launch.function.params
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    count = len(launch.arguments)
    for index, (parameter, value) in enumerate(zip(parameters, (*launch.arguments, *launch.constants))):
        name, special = parameter.name, not parameter.do_not_specialize
        if index >= count or value is None or (type(value) is int and value == 1 and special):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor | torch.dtype):
            dtype = value.dtype if isinstance(value, torch.Tensor) else value
            signature[name] = "*" + _TYPES[dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and special:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = _source_class(launch.function)(launch.function, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=gpu, options=options)


class _ReadAlone:
    """A kernel's source, read by one thread at a time.

    `ast.parse` of CPython before 3.12 counts its depth for all threads together, and raises SystemError
    where two take turns inside it. What Triton does without the interpreter's lock still runs side by side.
    """

    _reading = threading.RLock()

    def hash(self) -> str:
        with self._reading:
            return str(super().hash())  # type: ignore[misc]

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with self._reading:
            return super().make_ir(*args, **kwargs)  # type: ignore[misc]


class _Source(_ReadAlone, ASTSource):
    """The source of a kernel in Triton's own language."""


def _source_class(function: Any) -> Any:
    """What holds a kernel's source: Gluon's kernels have a class of their own."""
    if not getattr(function, "is_gluon", bool)():
        return _Source
    from triton.experimental.gluon._runtime import GluonASTSource

    return type("_GluonSource", (_ReadAlone, GluonASTSource), {})


def resources(compiled: Any, target: str) -> Resources:
    """What a kernel needs that `compile_for` made for one of `TARGETS`."""
    cuda = compiled.metadata.target.backend == "cuda"
    text = compiled.asm["ptx"] if cuda else compiled.asm["amdgcn"]
    found: dict[str, int] = {}
    for match in _MATRIX.findall(text):
        kind = "_".join(match.split("_")[:2]) if match.startswith("v_") else match
        found[kind] = found.get(kind, 0) + 1
    registers, spilled = _cuda_usage(compiled) if cuda else _hip_usage(text)
    products = tuple(_products(compiled.asm["ttgir"]))
    metadata = compiled.metadata
    return Resources(metadata.name, target, metadata.shared, registers, spilled, found, products)


def _products(text: str) -> Iterator[Product]:
    """The products of a kernel, one for each place in its code."""
    layouts = dict(re.findall(r"^#(\w+) = #\w+\.(\w+)<", text, re.MULTILINE))
    for line in text.splitlines():
        found = _PRODUCT.search(line)
        if found is None:
            continue
        unit = {"ttng.warp_group_dot": "wgmma", "ttng.tc_gen5_mma": "tcgen05"}.get(found["op"])
        rows, columns, depth = (int(found[name]) for name in ("rows", "columns", "depth"))
        unit = unit or _UNITS.get(layouts.get(found["layout"], ""), "none")
        yield Product(unit, rows, columns, depth, found["dtype"])


def _cuda_usage(compiled: Any) -> tuple[int, int]:
    """(registers a thread, bytes spilled), as the disassembler that Triton brings along reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file.name)
    registers = re.search(r"REG:(\d+)", text)
    stack, local = re.search(r"STACK:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    if registers is None or stack is None or local is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {text.strip()[:200]!r}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def _hip_usage(text: str) -> tuple[int, int]:
    """(vector registers a lane, spilled) from the metadata at the end of the assembly.

    What counts is memory: vector registers that were spilled, and bytes of scratch. Scalar registers spill
    into lanes of a vector register, which costs no memory and shows in the number of vector registers.
    """

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise RuntimeError(f"the assembly has no {name}")
        return int(match[1])

    return number("vgpr_count"), number("vgpr_spill_count") + number("private_segment_fixed_size")


def describe(launch: Launch) -> tuple[Any, ...]:
    """What decides how a launch compiles; launches of equal descriptions compile to the same code."""
    kinds: list[Any] = []
    for value in launch.arguments:
        if isinstance(value, torch.Tensor):
            kinds.append(value.dtype)
        elif type(value) is int:
            kinds.append((value == 1, value % 16 == 0, abs(value) >= 2**31))
        else:
            kinds.append(type(value))
    return (launch.function, tuple(kinds), launch.constants, launch.num_warps, launch.num_stages)


def compile_ahead(launches: Iterable[Launch], architecture: str, processes: int | None = None) -> None:
    """Compile launches in several processes, so that starting them later finds them in Triton's disk cache.

    What does not compile is left for the launch itself to report.
    """
    distinct = {describe(launch): launch for launch in launches}
    if not distinct:
        return
    jobs = [_portable(launch) for launch in distinct.values()]
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), processes or os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_compile_job, jobs, [architecture] * len(jobs), chunksize=4))


def _portable(launch: Launch) -> tuple[Any, ...]:
    function = launch.function.fn
    arguments = tuple(v.dtype if isinstance(v, torch.Tensor) else v for v in launch.arguments)
    constants = tuple(c.name if isinstance(c, tl.dtype) else c for c in launch.constants)
    marks = tuple(isinstance(c, tl.dtype) for c in launch.constants)
    return (
        (function.__module__, function.__qualname__),
        *(arguments, constants, marks, launch.num_warps, launch.num_stages),
    )


def _compile_job(job: tuple[Any, ...], architecture: str) -> None:
    (module, name), arguments, constants, marks, num_warps, num_stages = job
    function = getattr(importlib.import_module(module), name)
    values = tuple(tl.dtype(c) if mark else c for c, mark in zip(constants, marks))
    launch = Launch(function, arguments, values, num_warps, num_stages)
    with contextlib.suppress(Exception):  # the launch itself says what is wrong
        compile_for(launch, target_of(architecture))
