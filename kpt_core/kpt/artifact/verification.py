"""The call that an artifact is verified with: written when it is saved, made again when it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kpt.artifact import folder as layout
from kpt.artifact.folder import ArtifactError, read_tensors, write_tensors
from kpt.artifact.tensors import named, pack_call, unpack_call
from kpt.globalstate import seed_torch
from kpt.judge import bitwise, distances
from kpt.judge.calls import Call
from kpt.judge.state import untouched
from kpt.transaction.dispatch import original_forward

_INPUTS = "inputs.safetensors"
#: Relative rms difference between the stored outputs and those computed here, by what was optimised; of
#: integers and truth values the share that differs.
_TOLERANCES = {"original": 1e-3, "exact": 1e-3, "production": 5e-2, "aggressive": 0.15}


def write(model: torch.nn.Module, examples: list[Call] | None, scratch: Path) -> dict[str, Any] | None:
    """One call with both outputs, as files and JSON; None when it cannot be described, or in training.

    The model's buffers and the random states are afterwards what they were. Outputs that depend on
    random numbers are marked: of them `check` compares the shapes only.
    """
    packed = pack_call(examples[0]) if examples else None
    if packed is None or model.training or not examples:
        _warn(model, examples)
        return None
    tensors, described = packed
    call, original = examples[0], original_forward(model)
    before = _run(model, original, call)
    other = _run(model, original, call, seed=1)
    after = _run(model, model.forward, call)
    described["random"] = any(
        not _difference(other.get(name), value) <= _TOLERANCES["original"] for name, value in before.items()
    )
    folder = scratch / layout.VERIFY
    folder.mkdir()
    for name, content in ((_INPUTS, tensors), ("original", before), ("optimized", after)):
        write_tensors(content, (folder / name).with_suffix(".safetensors"))
    return described


def stored_call(model: torch.nn.Module, folder: Path, described: Mapping[str, Any]) -> Call:
    """The call in ``verify/``, on the model's device. Raises `ArtifactError`."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return unpack_call(read_tensors(folder / layout.VERIFY / _INPUTS), dict(described), device)


def check(
    model: torch.nn.Module,
    forward: Callable[..., Any],
    folder: Path,
    manifest: Mapping[str, Any],
    which: str,
) -> None:
    """Compare what ``forward`` computes here with ``verify/<which>``. Raises `ArtifactError`."""
    described = manifest.get("verify")
    if not described:
        return
    stored = read_tensors(folder / layout.VERIFY / f"{which}.safetensors")
    computed = _run(model, forward, stored_call(model, folder, described))
    allowed = _TOLERANCES[manifest["request"]["level"] if which == "optimized" else "original"]
    for name, expected in stored.items():
        mine = computed.get(name)
        if mine is None or mine.shape != expected.shape:
            raise ArtifactError("verify", f"The model has no output {name} of shape {tuple(expected.shape)}.")
        if described.get("random"):
            continue
        difference = _difference(mine, expected)
        if not difference <= allowed:
            raise ArtifactError(
                "verify",
                f"Output {name} differs from verify/{which} by {difference:.2g} relative; at most "
                f"{allowed:.2g} is expected.",
                "The weights, the code that builds the model, or verify/ are not those that were saved.",
            )


def _run(
    model: torch.nn.Module, forward: Callable[..., Any], call: Call, seed: int = 0
) -> dict[str, torch.Tensor]:
    call = call.clone()
    with untouched(), _buffers_kept(model), torch.no_grad():
        seed_torch(seed)
        return named(forward(*call.args, **call.kwargs))


@contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """A forward may count its calls or keep averages in buffers; they are put back."""
    held = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = {id(b): b.detach().clone() for _, named in held for b in named.values() if b is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, before in held:
                if any(buffers.get(name) is not buffer for name, buffer in before.items()):
                    buffers.clear()
                    buffers.update(before)
                for buffer in before.values():
                    if buffer is not None and not bitwise.bitwise_equal(buffer, values[id(buffer)]):
                        buffer.copy_(values[id(buffer)])


def _difference(mine: torch.Tensor | None, expected: torch.Tensor) -> float:
    if mine is None or mine.shape != expected.shape:
        return float("inf")
    if expected.is_complex() and mine.is_complex():
        mine, expected = torch.view_as_real(mine), torch.view_as_real(expected)
    if expected.is_floating_point():
        return distances.relative_error(mine, expected)
    return float((mine != expected).double().mean()) if expected.numel() else 0.0


def _warn(model: torch.nn.Module, examples: list[Call] | None) -> None:
    why, remedy = (
        ("it is in training mode", "call model.eval() and kpt.optimize first")
        if model.training
        else ("it was not called yet", "call it once, or pass example_inputs")
        if not examples
        else ("its example call holds objects that JSON cannot describe", "pass plain containers")
    )
    warnings.warn(
        f"the model is saved with its weights alone, because {why}: kpt.load can neither verify nor "
        f"optimise it ({remedy}, or call kpt.optimize after loading)",
        stacklevel=4,
    )
