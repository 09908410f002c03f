"""Draw one fresh call like an example, on its devices and with its strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kpt.judge import forms, fresh, tree
from kpt.judge.calls import Call, copied_leaf
from kpt.judge.layouts import laid_out, scaled_strides
from kpt.judge.leafnames import leaf_name, named_leaves
from kpt.judge.leafspecs import LeafSpec, mask_of


class Drawing:
    """One draw: masks first, since ids and labels follow them.

    ``leaves`` say what each tensor of ``example`` is; ``parameters`` name its positional arguments.
    """

    def __init__(
        self,
        leaves: Sequence[LeafSpec],
        parameters: tuple[str, ...],
        example: Call,
        generator: torch.Generator,
        sizes: dict[str, int],
        padding: bool,
        keep_integers: bool,
        mix_integers: bool,
        own_masks: bool,
    ) -> None:
        self.parameters, self.example, self.generator = parameters, example, generator
        self.padding, self.keep_integers, self.mix_integers = padding, keep_integers, mix_integers
        self.own_masks = own_masks
        self.leaves = {leaf.name: leaf for leaf in leaves}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bounds: dict[int, list[tuple[str, int]]] = {}
        for path, tensor in named_leaves(example):
            if isinstance(tensor, torch.Tensor):
                leaf = self._leaf(path)
                shape = tuple(
                    sizes.get(leaf.dims.get(axis, ""), size) for axis, size in enumerate(tensor.shape)
                )
                self.shapes[leaf.name] = shape
                for axis, size in enumerate(tensor.shape):
                    if tensor.dim() >= 2:
                        self.bounds.setdefault(size, []).append((leaf.name, axis))
        sides = sorted({side for leaf in leaves for side in leaf.form.sides}) or ["right"]
        self.side = sides[int(torch.randint(len(sides), (1,), generator=generator))]
        #: Lengths of rows by batch, width and the mask that they were drawn for.
        self.lengths: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.keeps: dict[tuple[int, ...], list[tuple[str, torch.Tensor]]] = {}

    def call(self) -> Call:
        drawn: dict[int, torch.Tensor] = {}
        named = [(path, leaf) for path, leaf in named_leaves(self.example) if isinstance(leaf, torch.Tensor)]
        # Rank 2 before higher ranks: a [batch, 1, query, key] mask shares the ragged lengths.
        named.sort(key=lambda item: (self._leaf(item[0]).role != "mask", item[1].dim()))
        for path, tensor in named:
            if id(tensor) not in drawn:
                leaf = self._leaf(path)
                drawn[id(tensor)] = self._placed(leaf, tensor, self._values(leaf, tensor))
        return self.example.map(
            lambda path, leaf: drawn[id(leaf)] if isinstance(leaf, torch.Tensor) else copied_leaf(leaf)
        )

    def _leaf(self, path: tree.Path) -> LeafSpec:
        return self.leaves[leaf_name(path, self.parameters)]

    def _values(self, leaf: LeafSpec, tensor: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[leaf.name]
        if leaf.role == "mask":
            keep = self._keep(leaf, tensor, shape)
            if keep.dim() == 2:
                self.keeps.setdefault(tuple(shape), []).append((leaf.name, keep))
            kept = torch.tensor(leaf.form.kept, dtype=leaf.dtype)
            return torch.where(keep, kept, torch.tensor(leaf.form.dropped, dtype=leaf.dtype))
        if leaf.role == "bool":
            if self.padding and leaf.form.mean in (0.0, 1.0):
                flags = fresh.mixed_flags(_distinct(tensor, shape), self.generator)
                return flags.expand(shape) == bool(leaf.form.mean)
            mean = min(max(leaf.form.mean, 0.25), 0.75) if self.padding else leaf.form.mean
            return torch.rand(shape, generator=self.generator) < mean
        if leaf.role == "integer":
            if self.mix_integers and leaf.may_flag:
                flags = fresh.mixed_flags(_distinct(tensor, shape), self.generator)
                return flags.expand(shape) == bool(leaf.form.values[0])
            if self.keep_integers:
                return fresh.stretch(tensor, shape)
            return fresh.draw_integers(
                leaf.form,
                shape,
                self.generator,
                example=tensor,
                keep=mask_of(leaf.name, self.keeps.get(tuple(shape), [])),
                bound=self._bound(leaf, tensor),
            )
        values = fresh.draw_floats(leaf.form, shape, self.generator)
        if leaf.dtype.is_complex:
            return torch.complex(values, fresh.draw_floats(leaf.form, shape, self.generator))
        return values

    def _keep(self, leaf: LeafSpec, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        padded = leaf.form.kind == "padded" or (leaf.form.kind == "causal" and bool(leaf.form.sides))
        full, own = shape, _distinct(tensor, tuple(tensor.shape))
        if self.own_masks and padded and _keeps_all(leaf, tensor):
            if len(own) >= 2:
                whole = torch.full(shape[:1], shape[-1])
                self.lengths.setdefault((shape[0], shape[-1]), []).append((whole, tensor))
            return torch.ones(shape, dtype=torch.bool)
        sequences = _is_sequence_mask(leaf.name) and len(own) >= 2 and own[-1] > 1
        if self.padding and leaf.form.kind == "ones":
            shape = _distinct(tensor, shape)
            if not sequences:
                return fresh.mixed_flags(shape, self.generator).expand(full)
        lengths = None
        if len(shape) >= 2 and (padded or (self.padding and sequences)):
            known = self.lengths.setdefault((shape[0], shape[-1]), [])
            # A mask of higher rank follows the first one of its sizes, another one of rank 2 its equal.
            # What masks something follows none that keeps all.
            usable = [
                (each, of)
                for each, of in known
                if leaf.form.kind != "padded" or not self.own_masks or int(each.min()) < shape[-1]
            ]
            lengths = next((each for each, of in usable if len(own) > 2 or _equal(of, tensor)), None)
            if lengths is None and (len(shape) == 2 or padded or self.padding):
                share = leaf.form.share if padded and leaf.form.share < 1.0 else 0.4
                lengths = fresh.ragged_lengths(shape[0], shape[-1], share, self.generator)
                known.append((lengths, tensor))
        drawn = fresh.draw_mask(
            leaf.form, shape, self.generator, example=tensor, lengths=lengths, side=self.side
        )
        return drawn.expand(full)

    def _bound(self, leaf: LeafSpec, tensor: torch.Tensor) -> int | None:
        """The new size of the axis that the longest of the example's lengths fills."""
        if leaf.form.kind != "lengths" or tensor.device.type == "meta" or tensor.numel() == 0:
            return None
        for name, axis in self.bounds.get(int(tensor.max()), []):
            return self.shapes[name][axis]
        return None

    def _placed(self, leaf: LeafSpec, tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = values.to(leaf.dtype)
        if tensor.layout is torch.strided and not tensor.is_quantized:
            strides = scaled_strides(tensor.shape, tensor.stride(), values.shape)
            values = laid_out(values.to(leaf.device), strides, tensor.storage_offset() % 16)
        else:
            values = values.to(leaf.device)
        return values.requires_grad_() if leaf.requires_grad else values


def _distinct(tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` with one element where those of ``tensor`` are one in memory (``expand``)."""
    if tensor.layout is not torch.strided:
        return shape
    return tuple(
        min(size, 1) if stride == 0 else size for size, stride in zip(shape, tensor.stride(), strict=True)
    )


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two masks of an example keep the same positions."""
    if first is second:
        return True
    if first.shape != second.shape or first.dtype != second.dtype or first.device != second.device:
        return False
    return first.device.type != "meta" and torch.equal(first, second)


def _keeps_all(leaf: LeafSpec, tensor: torch.Tensor) -> bool:
    """Whether ``tensor``, a mask of an example, masks nothing."""
    return tensor.device.type != "meta" and bool(forms.keep_flags(tensor, leaf.form.kept).all())


def _is_sequence_mask(name: str) -> bool:
    """Whether a mask's last axis is a sequence that may be padded, by the names that are in use."""
    last = name.rsplit(".", 1)[-1].lower()
    return last == "mask" or any(part in last for part in ("attention_mask", "attn_mask", "padding_mask"))
