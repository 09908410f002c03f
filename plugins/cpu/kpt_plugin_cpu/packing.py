"""Running the rows of a padded batch at their own lengths.

Rows of similar length form a group that runs with little padding; outputs are put back at their places,
with zeros where the input was padding. Exact wherever a row does not depend on other rows, which the
referee checks with padded inputs.

Each group is a call of its own, which reads all weights again: that is counted as so many positions, and a
batch is split where it saves more than that.

Which axes of an output are as long as the sequence is learnt from how sizes follow the groups' lengths.
Outputs whose axes cannot be told, or that have no rows on their first axis, are computed whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kpt.judge import tree
from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant, replace_forward
from kpt_plugin_cpu.estimates import compile_seconds, fixed_seconds, without_padding
from kpt_plugin_cpu.masks import is_flags, sequence_masks

#: The share of a call that splitting it has to save.
_WORTH = 0.15
#: Share of the gain of leaving tokens out that a split is predicted to have at most.
_BEHIND = 0.9
#: Groups that a batch is split into at most.
_GROUPS = 4


class PackPadding:
    """Splits a right-padded batch by length, into as many calls as pay: `_GROUPS` at most."""

    def __init__(self) -> None:
        self.split = 0
        self.whole = 0
        #: Set once outputs turn out not to be joinable: later calls are not tried.
        self.unjoinable = False

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        masks = sequence_masks(observation)
        if not masks:
            yield Skip("no input is a padding mask")
            return
        name = masks[0]
        shapes = [call.kwargs[name].shape for call in observation.calls]
        leaves = {leaf.name: leaf for leaf in observation.spec.leaves}
        if 1 not in leaves[name].dims:
            yield Skip("rows can run at their own lengths only if the lengths are declared dynamic")
            return
        padded = [1.0 - float(call.kwargs[name].float().mean()) for call in observation.calls]
        share = sum(padded) / len(padded)
        if share < _WORTH or all(shape[0] < 2 for shape in shapes):
            yield Skip(f"{share:.0%} of the positions are padding: too few to gain from")
            return
        masks_given = [call.kwargs[name] for call in observation.calls]
        if not any(_chunks(mask, _GROUPS, 0.0) for mask in masks_given):
            yield Skip(
                f"{share:.0%} of the positions are padding, but groups of rows save less than {_WORTH:.0%} "
                "of them: rows must be padded on the right, and to different lengths"
            )
            return
        groups, gain, overhead = _best_split(masks_given, observation, hardware)
        if groups < 2:
            fixed = overhead / (overhead + sum(mask.numel() for mask in masks_given) / len(masks_given))
            yield Skip(
                f"{share:.0%} of the positions are padding, but about {fixed:.0%} of a call does not depend "
                "on their number (weights are read, Python runs), and each group would take that again"
            )
            return
        # What a call costs anyway is an estimate, and groups hold some padding: tokens are left out first.
        gain = min(gain, without_padding(observation, hardware, share) * _BEHIND)
        # A static axis can be as long as the sequence by accident: only a declared one follows it.
        sequence = [
            leaf.name
            for leaf in leaves.values()
            if leaf.name != name and 1 in leaf.dims and leaf.shape[:2] == leaves[name].shape
        ]
        batch = leaves[name].dims.get(0)
        rows = [
            leaf.name
            for leaf in leaves.values()
            if batch is not None and leaf.dims.get(0) == batch and leaf.name not in (name, *sequence)
        ]
        # Groups of other sizes than the batch are further graphs to a compiler, where its size is fixed.
        sizes = {shape[0] for shape in shapes}
        further = {rows for size in sizes for rows in _rows_of_groups(size, groups)} - sizes
        yield Variant(
            "by length",
            {"mask": name, "inputs": sequence, "rows": rows, "groups": groups, "overhead": overhead},
            gain,
            0.0 if batch is not None else len(further) * compile_seconds(observation),
            sites=("",),
            touches_mask=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        params = variant.params
        name, groups, overhead = params["mask"], params["groups"], params["overhead"]
        inputs, by_row = tuple(params["inputs"]), tuple(params.get("rows", ()))
        inner = model.forward

        def forward(**kwargs: Any) -> Any:
            mask = kwargs.get(name)
            chunks = _chunks(mask, groups, overhead) if mask is not None and not self.unjoinable else None
            if mask is None or chunks is None:
                self.whole += 1
                return inner(**kwargs)
            outputs = []
            for rows, length in chunks:
                part = dict(kwargs)
                for key in (name, *inputs):
                    if isinstance(kwargs.get(key), torch.Tensor):
                        part[key] = kwargs[key][rows, :length].contiguous()
                for key in by_row:
                    if isinstance(kwargs.get(key), torch.Tensor):
                        part[key] = kwargs[key][rows]
                outputs.append(inner(**part))
            try:
                joined = _joined(outputs, chunks, mask.shape)
            except _Unjoinable:
                self.unjoinable = True
                self.whole += 1
                return inner(**kwargs)
            self.split += 1
            return joined

        return replace_forward(model, forward)

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.split > 0


def _rows_of_groups(size: int, groups: int) -> list[int]:
    """How many rows each group of a batch of ``size`` rows has."""
    return [len(rows) for rows in torch.arange(size).chunk(min(groups, size))]


def _best_split(
    masks: list[torch.Tensor], observation: Observation, hardware: HardwareProfile
) -> tuple[int, float, float]:
    """(groups, predicted gain, positions that a further call costs as much as); 1 group where none pays."""
    fixed = fixed_seconds(observation, hardware)
    positions = sum(mask.numel() for mask in masks) / len(masks)
    overhead = positions * fixed / max(observation.baseline_seconds - fixed, 1e-9)
    whole = sum(mask.numel() + overhead for mask in masks)
    best = 1, 1.0, overhead
    for groups in range(2, _GROUPS + 1):
        split = 0.0
        for mask in masks:
            chunks = _chunks(mask, groups, overhead)
            split += mask.numel() + overhead if chunks is None else _cost(chunks, overhead)
        if whole / split > best[1]:
            best = groups, whole / split, overhead
    return best


def _cost(chunks: list[tuple[torch.Tensor, int]], overhead: float) -> float:
    """What the calls of the groups cost, in positions."""
    return sum(rows.numel() * length + overhead for rows, length in chunks)


def _chunks(mask: torch.Tensor, groups: int, overhead: float) -> list[tuple[torch.Tensor, int]] | None:
    """Rows by similar length with each group's longest; None where splitting saves too little.

    Only right-padded masks of zeros and ones are split: a row's positions must begin at zero. Groups
    of one common length would not tell which axes of the outputs are as long as the sequence.
    """
    if not is_flags(mask):
        return None
    flags = mask != 0
    lengths = flags.sum(1)
    width = mask.shape[1]
    if mask.shape[0] < 2 or not bool((flags == (torch.arange(width) < lengths[:, None])).all()):
        return None
    lengths = lengths.clamp_min(1)
    order = torch.argsort(lengths)
    found = []
    for rows in order.chunk(min(groups, mask.shape[0])):
        found.append((rows, int(lengths[rows].max())))
    if len({length for _, length in found}) < 2:
        return None
    return found if _cost(found, overhead) <= (1.0 - _WORTH) * (mask.numel() + overhead) else None


class _Unjoinable(Exception):
    """The outputs of the groups do not say what the output of the whole batch is."""


def _joined(outputs: list[Any], chunks: list[tuple[torch.Tensor, int]], shape: torch.Size) -> Any:
    """The outputs of all groups as those of the whole batch, whose mask has ``shape``.

    Raises:
        _Unjoinable: the structures differ, a value is not the same for all groups, or a tensor's axes
            are neither rows, nor as long as the sequence, nor of one size.
    """
    leaves = [dict(tree.walk(output)) for output in outputs]
    if any(part.keys() != leaves[0].keys() for part in leaves):
        raise _Unjoinable

    def join(path: Any, leaf: Any) -> Any:
        values = [part[path] for part in leaves]
        if not isinstance(leaf, torch.Tensor):
            if tree.is_atom(leaf) and all(value == leaf for value in values):
                return leaf
            raise _Unjoinable
        whole = leaf.new_zeros(_whole_shape(values, chunks, shape))
        for value, (rows, _) in zip(values, chunks, strict=True):
            target = whole
            for axis in range(1, value.dim()):
                target = target.narrow(axis, 0, value.shape[axis])
            target[rows] = value
        return whole

    return tree.rebuild(outputs[0], join)


def _whole_shape(values: list[Any], chunks: list[tuple[torch.Tensor, int]], shape: torch.Size) -> list[int]:
    """The whole batch's shape of one output, of which ``values`` are the groups' parts.

    The lengths of the groups are not all equal, so an axis that equals each of them is the sequence's
    and an axis of one size is not.
    """
    counts = [rows.numel() for rows, _ in chunks]
    lengths = [length for _, length in chunks]
    tensors = all(isinstance(value, torch.Tensor) for value in values)
    if not tensors or len({value.dim() for value in values}) > 1 or values[0].dim() == 0:
        raise _Unjoinable
    if [value.shape[0] for value in values] != counts:
        raise _Unjoinable
    size = [shape[0]]
    for axis in range(1, values[0].dim()):
        sizes = [value.shape[axis] for value in values]
        if sizes == lengths:
            size.append(shape[1])
        elif len(set(sizes)) == 1:
            size.append(sizes[0])
        else:
            raise _Unjoinable
    return size
