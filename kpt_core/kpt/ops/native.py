"""What fp64 cannot prove: that the site does the same in each dtype, under autocast and with gradients.

A branch that fp64 never takes would go unseen. So the torch calls that the code makes have to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from kpt.ops.claims import Claims, Unproved, short
from kpt.ops.comparison import difference, tensors
from kpt.ops.promote import Trace

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


def native_dtypes(claims: Claims, twin: torch.nn.Module) -> tuple[str, ...]:
    """The dtypes in which the site makes the same calls and returns the same dtype as the op."""
    binding = claims.first
    held: list[str] = []
    baseline: list[str] | None = None
    examples = claims.examples
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        claims.check_time()
        twin.to(dtype)
        bound = examples.draw(0, twin, dtype=dtype)
        try:
            with torch.no_grad():
                out, trace = _traced(lambda b=bound: claims.call(twin, b))  # type: ignore[misc]
        except RuntimeError:
            continue  # no kernel for this dtype on this device
        if baseline is None:
            baseline = trace
            if not claims.straight:
                _branches(claims, twin, bound, baseline)
        elif trace != baseline and not claims.straight:
            raise Unproved(f"it takes another branch in {_name(dtype)}")
        with torch.no_grad():
            claimed = claims.claim(twin, bound, binding)
        if [t.dtype for t in tensors(out)] != [t.dtype for t in tensors(claimed)]:
            continue
        if difference(out, claimed) > _TOLERANCES[dtype]:
            raise Unproved(f"it computes something else in {_name(dtype)}")
        held.append(_name(dtype))
    if not held:
        raise Unproved("it returns another dtype than the op does")
    if examples.mixed:
        twin = examples.twin(None)
        twin.eval()
        bound = examples.draw(0, twin, dtype=None)
        with torch.no_grad():
            out, claimed = claims.call(twin, bound), claims.claim(twin, bound, binding)
        dtypes = [[_name(t.dtype) for t in tensors(value)] for value in (out, claimed)]
        if dtypes[0] != dtypes[1]:
            given = " and ".join(dtypes[0])
            raise Unproved(f"it returns {given} where {binding.op} gives {' and '.join(dtypes[1])}")
    return tuple(held)


def _branches(claims: Claims, twin: torch.nn.Module, bound: dict[str, Any], baseline: list[str]) -> None:
    device = claims.examples.device.type
    settings: list[tuple[str, Any]] = [
        ("with gradients enabled", torch.enable_grad()),
        ("in inference mode", torch.inference_mode()),
        ("under autocast", _autocast(device)),
    ]
    for what, setting in settings:
        try:
            with setting:
                _, trace = _traced(lambda: claims.call(twin, bound))
        except RuntimeError as error:
            raise Unproved(f"it fails {what}: {short(error)}") from error
        if trace != baseline:
            raise Unproved(f"it takes another branch {what}")


class _autocast:
    """Autocast without gradients, on devices that have it."""

    def __init__(self, device: str) -> None:
        known = torch.amp.autocast_mode.is_autocast_available(device)
        self.inner: Any = torch.autocast(device, torch.bfloat16) if known else nullcontext()
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.inner.__exit__(*exc)
        self.no_grad.__exit__(*exc)


def _traced(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    with Trace() as trace:
        out = function()
    return out, trace.names


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
