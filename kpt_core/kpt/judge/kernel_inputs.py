"""Inputs for judging a kernel: drawn like an op's arguments at a site, with other numbers of rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from kpt.judge.calls import Call
from kpt.judge.draws import InputSpec

#: Draws an op's arguments by name, given a generator and a number of rows (None: as at the site).
MakeInputs = Callable[[torch.Generator, "int | None"], Mapping[str, Any]]
_WEIGHT_NAMES = ("weight", "bias", "scale", "offset", "gamma", "beta", "sinks")


def is_weight(name: str) -> bool:
    """Whether an op's argument is named as a parameter rather than an activation."""
    return any(part in name.lower() for part in _WEIGHT_NAMES)


def inputs_like(
    arguments: Mapping[str, Any],
    *,
    fixed: Collection[str] = (),
    dims: Mapping[str, Mapping[int, str]] | None = None,
) -> MakeInputs:
    """A `MakeInputs` that draws arguments like ``arguments`` (an op's, by name).

    Args:
        fixed: names that are passed on as they are, for a kernel that packed these weights.
        dims: dimensions by argument and axis, the ones that vary with the rows. By default every axis
            but the features' (and the heads') of the first activation, and those of equal size of the others.
    """
    drawn = {name: value for name, value in arguments.items() if name not in fixed}
    kept = {name: arguments[name] for name in fixed if name in arguments}
    axes = _row_axes(drawn) if dims is None else {name: dict(named) for name, named in dims.items()}
    spec = InputSpec.from_calls([Call((), dict(drawn))], axes)

    def make(generator: torch.Generator, rows: int | None) -> Mapping[str, Any]:
        sizes = None
        if rows is not None and spec.dimensions:
            names = list(spec.dimensions)
            sizes = {name: spec.dimensions[name].observed[0] for name in names}
            # The innermost axis varies; with one row, all do.
            sizes.update(dict.fromkeys(names, 1) if rows == 1 else {names[-1]: rows})
        return {**spec.draw(generator, sizes=sizes).kwargs, **kept}

    return make


def _row_axes(arguments: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    activations = {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.dim() >= 1 and not is_weight(name)
    }
    first = next((value for value in activations.values() if value.is_floating_point()), None)
    if first is None or first.dim() < 2:
        return {}
    # Of [batch, heads, sequence, head_dim] the heads are structure: others may have fewer.
    rows = [axis for axis in range(first.dim() - 1) if first.dim() != 4 or axis != 1]
    sizes = {axis: first.shape[axis] for axis in rows}
    found: dict[str, dict[int, str]] = {}
    for name, value in activations.items():
        free = list(rows)
        # The last axis is features, except for class indices [rows] and masks [..., query, key].
        last = value.dim() if value.dim() == 1 or "mask" in name else value.dim() - 1
        for axis in range(last):
            same = value.dim() == first.dim() and axis in free and sizes[axis] == value.shape[axis]
            match = axis if same else next((row for row in free if sizes[row] == value.shape[axis]), None)
            if match is None or (value.dim() == first.dim() and not same and "mask" not in name):
                continue
            found.setdefault(name, {})[axis] = f"rows{match}"
            if "mask" not in name:  # both axes of a mask run along the sequence
                free.remove(match)
    return found


def is_float(value: Any) -> bool:
    """Whether it is a floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def tensors_of(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among arguments, by name."""
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def tensor_named(inputs: Mapping[str, Any], name: str) -> torch.Tensor:
    """The argument of this name, which is a tensor."""
    value = inputs[name]
    assert isinstance(value, torch.Tensor)
    return value


def shapes(inputs: Mapping[str, Any]) -> str:
    """The shapes of the activations, for a message."""
    return ", ".join(
        f"{name} {tuple(t.shape)}" for name, t in tensors_of(inputs).items() if not is_weight(name)
    )


def widened(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with floating-point tensors in another dtype."""
    return {name: value.to(dtype) if is_float(value) else value for name, value in inputs.items()}
