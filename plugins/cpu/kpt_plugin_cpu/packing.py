"""Running the rows of a padded batch at their own lengths.

Rows of one length form a group that runs without padding; outputs are put back at their places, with
zeros where the input was padding. Exact wherever a row does not depend on other rows, which the
referee checks with padded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge import tree
from kpt.specs import HardwareProfile, Skip, Undo, Variant
from kpt_plugin_cpu.masks import sequence_masks

if TYPE_CHECKING:
    from kpt.transaction.observe import Observation

#: A call below this many padded positions is not worth splitting.
_WORTH = 0.15


class PackPadding:
    """Splits a right-padded batch by length, at most into ``groups`` calls."""

    def __init__(self) -> None:
        self.split = 0
        self.whole = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        masks = sequence_masks(observation)
        if not masks:
            yield Skip("no input is a padding mask")
            return
        name = masks[0]
        shapes = [call.kwargs[name].shape for call in observation.calls]
        if not observation.dynamic:
            yield Skip("rows can run at their own lengths only if the lengths are declared dynamic")
            return
        padded = [1.0 - float(call.kwargs[name].float().mean()) for call in observation.calls]
        share = sum(padded) / len(padded)
        if share < _WORTH or all(shape[0] < 2 for shape in shapes):
            yield Skip(f"{share:.0%} of the positions are padding: too few to gain from")
            return
        sequence = [
            leaf.name for leaf in observation.spec.leaves if leaf.shape[:2] == shapes[0] and leaf.name != name
        ]
        yield Variant(
            "by length",
            {"mask": name, "inputs": sequence, "groups": 4},
            1.0 / (1.0 - 0.8 * share),
            sites=("",),
            touches_mask=True,
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        name, inputs, groups = (
            variant.params["mask"],
            tuple(variant.params["inputs"]),
            variant.params["groups"],
        )
        inner = model.forward

        def forward(**kwargs: Any) -> Any:
            mask = kwargs.get(name)
            chunks = _chunks(mask, groups) if mask is not None else None
            if mask is None or chunks is None:
                self.whole += 1
                return inner(**kwargs)
            self.split += 1
            outputs = []
            for rows, length in chunks:
                part = dict(kwargs)
                for key in (name, *inputs):
                    if isinstance(kwargs.get(key), torch.Tensor):
                        part[key] = kwargs[key][rows, :length].contiguous()
                outputs.append(inner(**part))
            return _joined(outputs, chunks, mask.shape)

        before = model.__dict__.get("forward")
        model.forward = forward  # type: ignore[method-assign, assignment]

        def undo() -> None:
            if before is None:
                model.__dict__.pop("forward", None)
            else:
                model.__dict__["forward"] = before

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.split > 0


def _chunks(mask: torch.Tensor, groups: int) -> list[tuple[torch.Tensor, int]] | None:
    """Rows by similar length with each group's longest; None where splitting saves too little.

    Only right-padded masks are split: a row's positions must begin at zero.
    """
    flags = mask != 0
    lengths = flags.sum(1)
    width = mask.shape[1]
    if mask.shape[0] < 2 or not bool((flags == (torch.arange(width) < lengths[:, None])).all()):
        return None
    lengths = lengths.clamp_min(1)
    if float(lengths.sum()) > (1.0 - _WORTH) * mask.numel():
        return None
    order = torch.argsort(lengths)
    found = []
    for rows in order.chunk(min(groups, mask.shape[0])):
        found.append((rows, int(lengths[rows].max())))
    return found


def _joined(outputs: list[Any], chunks: list[tuple[torch.Tensor, int]], shape: torch.Size) -> Any:
    """The outputs of all groups as those of the whole batch."""
    leaves = [dict(tree.walk(output)) for output in outputs]

    def join(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        size = list(leaf.shape)
        size[0] = shape[0]
        by_length = [axis for axis in range(1, leaf.dim()) if leaf.shape[axis] == chunks[0][1]]
        for axis in by_length:
            if all(part[path].shape[axis] == length for part, (_, length) in zip(leaves, chunks)):
                size[axis] = shape[1]
        whole = leaf.new_zeros(size)
        for part, (rows, _) in zip(leaves, chunks):
            value = part[path]
            target = whole
            for axis in range(1, value.dim()):
                target = target.narrow(axis, 0, value.shape[axis])
            target[rows] = value
        return whole

    return tree.rebuild(outputs[0], join)
