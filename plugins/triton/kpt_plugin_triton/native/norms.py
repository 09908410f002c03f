"""Norms whose autograd node is C++, so that no Python is on the way to their kernels.

In eager training, autograd runs a backward pass in a thread of its own, and Python there has to fetch every
object from another core: at 4096x4096 the GPU needs 57 µs for a norm and its gradients, and waited 60 µs for
the host (H200). The library is compiled in the background when a norm is first trained with, and kept; until
it is there, and where it cannot be, the same kernels are launched from Python. ``KPT_TRITON_NATIVE=0`` leaves
it out.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kpt_plugin_triton.launch import INTERPRETED, Bound, version
from kpt_plugin_triton.native.library import NotCompiled, load
from kpt_plugin_triton.norm_rows import plan_backward, plan_forward
from kpt_plugin_triton.rows import wide_dtype
from kpt_plugin_triton.tuning import FORGETTING

VARIABLE = "KPT_TRITON_NATIVE"
#: Versions of Triton whose kernels take the parameters that the library passes.
_TRITONS = ("3.6.",)
#: Kinds of calls (sizes, dtypes, which gradients are wanted) that launches are kept for.
_MOST = 4096
_SLOTS = (
    *("x", "weight", "bias", "y", "mean", "rstd", "dy", "dx"),
    *("weight_sums", "bias_sums", "dweight", "dbias"),
)
_log = logging.getLogger("kpt")

#: ``norm(x, weight, bias, eps, offset, centred)``: y, or None for what Python has to do; None as long as
#: the library is not there.
norm: Callable[..., torch.Tensor | None] | None = None
_library: ModuleType | None = None
_thread: threading.Thread | None = None
_state = "not needed so far"
_offered: set[Any] = set()
_lock = threading.Lock()


def state() -> str:
    """``in use``, or why launches come from Python: what is missing, or that it is being compiled."""
    return _state


def begin() -> None:
    """Compile and load the library in the background, unless that was begun or cannot be."""
    global _thread, _state
    if _thread is not None or INTERPRETED:
        return
    with _lock:
        if _thread is not None:
            return
        _state = "being compiled"
        _thread = threading.Thread(target=_make, name="kpt_triton_norms", daemon=True)
        _thread.start()


def wait() -> str:
    """Begin if need be, wait for the compiler, and say how that ended (see `state`)."""
    begin()
    thread = _thread
    if thread is not None:
        thread.join()
    return _state


def _make() -> None:
    global norm, _library, _state, _thread
    try:
        if os.environ.get(VARIABLE, "1") in ("0", "false", "off"):
            raise NotCompiled(f"{VARIABLE} is {os.environ[VARIABLE]}")
        if not version().startswith(_TRITONS):
            known = " or ".join(f"{known}x" for known in _TRITONS)
            raise NotCompiled(f"Triton is {version()}, and the library knows how {known} launches")
        library = load("kpt_triton_norms")
        library.connect(*_driver())
    except (NotCompiled, OSError, AttributeError) as error:
        _state = str(error)
        if isinstance(error, NotCompiled) and error.ended:
            _thread = None  # the next backward pass begins anew
        _log.info("norms are launched from Python: %s", error)
        return
    _library, norm, _state = library, library.norm, "in use"


def _driver() -> tuple[int, int, int]:
    """Addresses of what launches a kernel, gives the current stream, and sets a thread's context (or 0)."""
    folder = Path(torch.__file__).parent / "lib"
    if torch.version.hip:
        from triton.backends.amd.driver import _get_path_to_hip_runtime_dylib

        runtime = ctypes.CDLL(_get_path_to_hip_runtime_dylib())
        return _address(runtime.hipModuleLaunchKernel), _stream(folder / "libtorch_hip.so"), 0
    runtime = ctypes.CDLL("libcuda.so.1")
    return (
        *(_address(runtime.cuLaunchKernel), _stream(folder / "libtorch_cuda.so")),
        _address(runtime.cuCtxSetCurrent),
    )


def _stream(library: Path) -> int:
    return _address(ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _context() -> int:
    """This thread's context on the current device; 0 where threads need none."""
    if torch.version.hip:
        return 0
    found = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(found))
    return found.value or 0


def offer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    wanted: tuple[bool, bool, bool],
) -> None:
    """Have calls like this one served by the library from now on, as far as it can.

    Called where Python has just launched such a call (with its backward pass, if any gradient is ``wanted``:
    of x, weight and bias), so that the kernels are compiled.
    """
    if _library is None or not x.is_cuda:
        return
    key = (
        *(x.device, x.dtype, x.shape, None if weight is None else weight.dtype),
        *(None if bias is None else bias.dtype, eps, offset, centred, wanted),
    )
    if key in _offered or len(_offered) >= _MOST:
        return
    _offered.add(key)
    launches = _described(x, weight, bias, eps, offset, centred, wanted)
    if launches is not None:
        bits = sum(1 << place for place, each in enumerate(wanted) if each)
        _library.add(x, weight, bias, eps, offset, centred, bits, *launches, _context())


def forget() -> None:
    """Have calls planned anew."""
    _offered.clear()
    if _library is not None:
        _library.forget()


FORGETTING.append(forget)


def _described(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Any, list[Any], int] | None:
    """(forward, backward, partial sums) as the library takes them; None where a kernel asks for more."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    wide = wide_dtype(x.dtype)
    records = any(wanted)
    scales = None if weight is None else ("weight", weight.dtype)
    shifts = None if bias is None else ("bias", bias.dtype)
    mean = ("mean", wide) if centred else None
    rstd = ("rstd", wide)
    first = plan_forward(x.device.index, x.dtype, rows, columns, centred, records, False)
    forward = _launch(
        first,
        *(("x", x.dtype), None, scales, shifts, ("y", x.dtype), None),
        *((mean, rstd) if records else (None, None)),
        *(rows, columns, 0, eps, offset),
    )
    if not records:
        return None if forward is None else (forward, [], 0)
    then = plan_backward(x.device.index, x.dtype, rows, columns, centred)
    weighs, shifted = wanted[1], wanted[2]
    data = ("x", x.dtype), ("dy", x.dtype)
    sums = ("weight_sums", wide) if weighs else None, ("bias_sums", wide) if shifted else None
    before = *data, None, scales, mean, rstd, ("dx", x.dtype)
    strides = columns, columns, 0
    if then.sums is None:
        backward = [_launch(then.main, *before, *sums, rows, *strides, offset)]
    else:
        backward = [_launch(then.main, *before, *strides, offset)]
    if weighs or shifted:
        if then.sums is not None:
            backward.append(_launch(then.sums, *data, mean, rstd, *sums, rows, columns, columns))
        ends = (
            ("dweight", weight.dtype) if weighs and weight is not None else None,
            ("dbias", bias.dtype) if shifted and bias is not None else None,
        )
        backward.append(_launch(then.total, *sums, *ends, then.programs))
    if forward is None or None in backward:
        return None
    return forward, backward, then.programs


def _launch(bound: Bound, *arguments: Any) -> Any:
    """A launch as the library takes it; a tensor is (slot, dtype)."""
    compiled = bound.kernel.function.warmup(
        *(value[1] if isinstance(value, tuple) else value for value in arguments),
        *bound.constants,
        grid=bound.grid,
        num_warps=bound.num_warps,
        num_stages=bound.num_stages,
    )
    if hasattr(compiled, "result"):  # compiled in the background
        compiled = compiled.result()
    run, metadata = compiled.run, compiled.metadata  # asking for the former loads the kernel
    scratch = getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0)
    if scratch or metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
        return None  # these are launched in other ways
    parameters = _parameters(list(compiled.src.signature.values()), arguments)
    threads = metadata.num_warps * metadata.target.warp_size
    return compiled.function, bound.grid, threads, metadata.shared, parameters


def _parameters(signature: Sequence[str], arguments: Sequence[Any]) -> list[tuple[int, str, Any]]:
    """What of ``arguments`` the compiled code takes: constants are part of it."""
    found: list[tuple[int, str, Any]] = []
    for kind, value in zip(signature, arguments):
        if kind == "constexpr":
            continue
        if isinstance(value, tuple):
            found.append((_SLOTS.index(value[0]), "", None))
        else:
            found.append((-1, kind, value))
    return found
