"""What a caller is handed beside the values: structure, classes, dtypes, memory, and its own inputs."""

from __future__ import annotations

import gc
from typing import Any

import torch

from kpt.judge import outputs, tree
from kpt.judge.aliasing import holders
from kpt.judge.verdict import Verdict, passed, rejected


def judge_inputs(before: Any, after: Any) -> Verdict:
    """Reject under ``input-modified`` if a call's arguments are not bit for bit what they were."""
    changed = outputs.identical(before, after)
    return passed() if changed is None else rejected("input-modified", f"input {changed} was modified")


def judge_strides(candidate: Any, eager: Any) -> Verdict:
    """Reject under ``stride`` an output that is not contiguous where eager's is: ``view`` fails on it.

    That holds for what a caller gets at hand, in a list or a field too; what lies deeper (layers of a cache)
    is read by the model itself.
    """
    own = {path: leaf for path, leaf in tree.walk(eager) if isinstance(leaf, torch.Tensor)}
    for path, mine in tree.walk(candidate):
        theirs = own.get(path)
        if len(path) > 2 or theirs is None or not isinstance(mine, torch.Tensor):
            continue
        plain = mine.layout is torch.strided and theirs.layout is torch.strided
        if plain and theirs.is_contiguous() and not mine.is_contiguous():
            strides = f"the strides {list(mine.stride())}, eager's {list(theirs.stride())}"
            return rejected("stride", f"{tree.spell(path)} has {strides}")
    return passed()


def judge_held(candidate: Any, eager: Any) -> Verdict:
    """Reject under ``replay`` an output whose memory somebody holds after the call, unlike eager's: it will
    be answered with again, or written to by a later call."""
    own = outputs.tensors(eager)
    for name, mine in outputs.tensors(candidate).items():
        if name in own and holders(mine) > holders(own[name]):
            gc.collect()  # what only waits for the collector holds nothing
            if holders(mine) > holders(own[name]):
                return rejected("replay", f"{name} is held after the call, unlike in eager mode")
    return passed()


def judge_structure(candidate: Any, eager: Any) -> Verdict | None:
    """A rejection where the candidate's output is not of eager's form; None where it is."""
    if tree.structure(candidate) != tree.structure(eager):
        return rejected("structure", _difference(candidate, eager))
    for mine, own in zip(outputs.leaves(candidate), outputs.leaves(eager), strict=True):
        # An array and a tensor of the same values, or an array and a number of NumPy's, are not the same.
        plain = isinstance(mine.value, mine.kind) and isinstance(own.value, own.kind)
        if mine.is_tensor != own.is_tensor or not (plain or mine.kind is own.kind):
            return rejected(
                "structure", f"{mine.name} is of class {mine.kind.__name__}, eager's of {own.kind.__name__}"
            )
        if not mine.is_tensor:
            if not outputs.equal_objects(mine.value, own.value):
                return rejected("value", f"{mine.name} is {_short(mine.value)}, eager's {_short(own.value)}")
            continue
        if _class_of(mine.value) is not _class_of(own.value):
            return rejected(
                "structure",
                f"{mine.name} is a {type(mine.value).__name__}, eager's {type(own.value).__name__}",
            )
        if mine.value.is_inference() != own.value.is_inference():
            made = "in" if mine.value.is_inference() else "outside of"
            return rejected("structure", f"{mine.name} was made {made} inference mode, unlike eager's")
        if mine.value.shape != own.value.shape:
            return rejected(
                "shape", f"{mine.name} is {tuple(mine.value.shape)}, eager's {tuple(own.value.shape)}"
            )
        if mine.value.dtype != own.value.dtype:
            return rejected("dtype", f"{mine.name} is {mine.value.dtype}, eager's {own.value.dtype}")
        if mine.value.device != own.value.device or mine.value.layout != own.value.layout:
            return rejected(
                "structure",
                f"{mine.name} is {mine.value.layout} on {mine.value.device}, "
                f"eager's {own.value.layout} on {own.value.device}",
            )
    return None


def _class_of(tensor: torch.Tensor) -> type:
    """The tensor's class; parameters and buffers are plain tensors to whoever gets them."""
    plain = (torch.nn.Parameter, torch.nn.Buffer)
    return torch.Tensor if isinstance(tensor, plain) else type(tensor)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _difference(candidate: Any, eager: Any) -> str:
    mine = {tree.spell(path): type(leaf).__name__ for path, leaf in tree.walk(candidate)}
    own = {tree.spell(path): type(leaf).__name__ for path, leaf in tree.walk(eager)}
    if mine == own:
        return (
            f"the output is a {type(candidate).__name__}, eager's a {type(eager).__name__}, or differs inside"
        )
    names = [name for name in {**mine, **own} if mine.get(name) != own.get(name)]
    return f"the outputs differ at {', '.join(names[:5])}"
