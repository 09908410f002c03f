"""Fresh inputs like the examples: what varies from call to call, and how to draw it again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kpt.judge import forms, tree
from kpt.judge.calls import Call
from kpt.judge.dimensions import (
    Dimension,
    declared_axes,
    drawn_sizes,
    observe_dimensions,
    proportional_sizes,
)
from kpt.judge.drawing import Drawing
from kpt.judge.leafnames import leaf_name, named_leaves, positional_names
from kpt.judge.leafspecs import LeafSpec, observe_leaves


@dataclass(frozen=True)
class InputSpec:
    """What the calls of a model look like.

    ``leaves`` are the tensor inputs, ``constants`` the other arguments by name, ``dimensions`` the
    dynamic dimensions by name.
    """

    leaves: tuple[LeafSpec, ...]
    constants: dict[str, Any]
    dimensions: dict[str, Dimension]
    _examples: tuple[Call, ...] = field(repr=False, default=())
    _parameters: tuple[str, ...] = ()
    _signatures: frozenset[str] = field(repr=False, default=frozenset())

    @classmethod
    def from_calls(
        cls,
        calls: Sequence[Call],
        dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> InputSpec:
        """Learn from example calls of ``forward`` (a function or module; it names positional inputs).

        Raises:
            ValueError: no call, or ``dynamic_shapes`` does not fit (see `kpt.judge.dimensions`).
        """
        if not calls:
            raise ValueError("an input spec needs at least one example call")
        parameters = positional_names(forward)
        observed: dict[str, list[tuple[tree.Path, torch.Tensor, int]]] = {}
        constants: dict[str, Any] = {}
        for number, call in enumerate(calls):
            for path, leaf in named_leaves(call):
                name = leaf_name(path, parameters)
                if isinstance(leaf, torch.Tensor):
                    observed.setdefault(name, []).append((path, leaf, number))
                elif leaf is not None:
                    constants[name] = leaf
        ranks = {name: seen[0][1].dim() for name, seen in observed.items()}
        top_level = [leaf_name(("args", index), parameters) for index in range(len(calls[0].args))]
        axes = declared_axes(dynamic_shapes, ranks, [*top_level, *calls[0].kwargs])
        shapes = [
            {
                name: tuple(t.shape)
                for name, seen in observed.items()
                for _, t, where in seen
                if where == number
            }
            for number in range(len(calls))
        ]
        dimensions = observe_dimensions(axes, shapes)
        dims = {name: {axis: entry.name for axis, entry in named.items()} for name, named in axes.items()}
        leaves = observe_leaves(observed, dims)
        spec = cls(leaves, constants, dimensions, tuple(calls), parameters)
        return cls(
            leaves,
            constants,
            dimensions,
            tuple(calls),
            parameters,
            frozenset(_digest(spec.signature(call)) for call in calls),
        )

    def name_of(self, path: tree.Path) -> str:
        """The name of the leaf at ``path`` (which starts with "args" or "kwargs")."""
        return leaf_name(path, self._parameters)

    @property
    def examples(self) -> tuple[Call, ...]:
        """The example calls, in the order in which they were given."""
        return self._examples

    # -- drawing ------------------------------------------------------------------------------

    def draw(
        self,
        generator: torch.Generator,
        *,
        examples: Sequence[int] | None = None,
        sizes: Mapping[str, int] | None = None,
        padding: bool = False,
        keep_integers: bool = False,
        mix_integers: bool = False,
        own_masks: bool = False,
    ) -> Call:
        """A fresh call like one of the examples, on the examples' devices, with their strides.

        Args:
            generator: a CPU generator; the only source of randomness.
            examples: positions of the examples of which one is picked; by default all.
            sizes: sizes of dynamic dimensions by name; by default those of the example at hand.
            padding: pad every sequence mask raggedly, even if no example was padded, and mix other masks
                and flags that are alike in the examples.
            keep_integers: leave integers as in the example, for models that accept few combinations.
            mix_integers: draw zeros and ones where the examples hold one of them everywhere. Eager may refuse
                that, and on an accelerator it may not be tried: a 1 may be no row of a table.
            own_masks: where a [batch, sequence] mask of the example picked masks nothing, so does the draw's;
                otherwise it is padded as soon as another example is.

        Raises:
            ValueError: an unknown dimension, or a spec from `from_dict` with values that cannot be drawn.
        """
        unknown = sorted(set(sizes or {}) - set(self.dimensions))
        if unknown:
            raise ValueError(
                f"unknown dimension {unknown[0]!r}; the dimensions are {', '.join(self.dimensions) or 'none'}"
            )
        positions = range(len(self._examples)) if examples is None else examples
        picked = positions[int(torch.randint(len(positions), (1,), generator=generator))]
        return Drawing(
            self.leaves,
            self._parameters,
            self._examples[picked],
            generator,
            dict(sizes or {}),
            padding,
            keep_integers,
            mix_integers,
            own_masks,
        ).call()

    def examples_with_empty_tensors(self) -> dict[int, Call]:
        """Those of the examples that hold a tensor without elements, by position."""

        def empty(call: Call) -> bool:
            return any(isinstance(leaf, torch.Tensor) and not leaf.numel() for _, leaf in named_leaves(call))

        return {position: call for position, call in enumerate(self._examples) if empty(call)}

    def sizes(self, generator: torch.Generator, number: int) -> list[dict[str, int]]:
        """At most ``number`` assignments for `draw`: odd sizes first, then the bounds of each dimension."""
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        return drawn_sizes(self.dimensions.values(), number, random.Random(seed))

    def sizes_in_proportion(self) -> list[dict[str, int]]:
        """Assignments for `draw` for models that take no others, as where one size is twice another."""
        return proportional_sizes(self.dimensions.values(), map(self._sizes_of, self._examples))

    def _sizes_of(self, call: Call) -> dict[str, int]:
        """The sizes of the dynamic dimensions in ``call``."""
        dims = {leaf.name: leaf.dims for leaf in self.leaves}
        return {
            name: leaf.shape[axis]
            for path, leaf in named_leaves(call)
            if isinstance(leaf, torch.Tensor)
            for axis, name in dims.get(self.name_of(path), {}).items()
        }

    @property
    def has_masks(self) -> bool:
        """Whether any input is a mask over [batch, sequence]."""
        return any(leaf.role == "mask" and len(leaf.shape) == 2 for leaf in self.leaves)

    @property
    def has_constant_flags(self) -> bool:
        """Whether a mask or another boolean input is the same everywhere, so that no draw like it varies."""
        return any(
            leaf.form.kind == "ones" if leaf.role == "mask" else leaf.form.mean in (0.0, 1.0)
            for leaf in self.leaves
            if leaf.role in ("mask", "bool")
        )

    @property
    def has_constant_integers(self) -> bool:
        """Whether some integers are all 0 or all 1 in the examples and may stand for something else."""
        return any(leaf.may_flag for leaf in self.leaves)

    def padding_masks(self, call: Call) -> dict[str, torch.Tensor]:
        """The [batch, sequence] masks of ``call`` by name, as flags of the positions that count."""
        by_name = {leaf.name: leaf for leaf in self.leaves if leaf.role == "mask"}
        masks = {}
        for path, tensor in named_leaves(call):
            leaf = by_name.get(self.name_of(path))
            if leaf is not None and isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                masks[leaf.name] = forms.keep_flags(tensor, leaf.form.kept)
        return masks

    # -- recognising calls ----------------------------------------------------------------------

    def signature(self, call: Call) -> Any:
        """What a plan may depend on besides sizes of dynamic dimensions, as a hashable value."""
        dims = {leaf.name: leaf.dims for leaf in self.leaves}
        parts: list[Any] = [tree.structure(call.args), tree.structure(call.kwargs)]
        for path, leaf in named_leaves(call):
            name = self.name_of(path)
            if isinstance(leaf, torch.Tensor):
                dynamic = dims.get(name, {})
                static = tuple((axis, size) for axis, size in enumerate(leaf.shape) if axis not in dynamic)
                parts.append(
                    (name, str(leaf.dtype), str(leaf.device), leaf.dim(), static, leaf.requires_grad)
                )
            else:
                parts.append((name, type(leaf).__qualname__, leaf if _hashable(leaf) else repr(leaf)))
        return tuple(parts)

    def misfit(self, call: Call) -> str | None:
        """Why ``call`` is unlike the examples, or None if it is like them with sizes inside the ranges."""
        if _digest(self.signature(call)) not in self._signatures:
            return "its structure, a dtype, a device, a rank, a static size or a constant is new"
        dims = {leaf.name: leaf.dims for leaf in self.leaves}
        sizes: dict[str, int] = {}
        for path, leaf in named_leaves(call):
            if not isinstance(leaf, torch.Tensor):
                continue
            for axis, name in dims.get(self.name_of(path), {}).items():
                size = leaf.shape[axis]
                if size not in self.dimensions[name]:
                    known = self.dimensions[name]
                    return f"{name} is {size}, outside {known.low}..{known.high}"
                if sizes.setdefault(name, size) != size:
                    return f"{name} is {sizes[name]} in one input and {size} in another"
        return None

    def fits(self, call: Call) -> bool:
        """Whether ``call`` is like the examples, with sizes inside the declared ranges."""
        return self.misfit(call) is None

    # -- JSON -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values. Constants that JSON cannot hold are stored by their ``repr``."""
        example = self._examples[0]
        return {
            "leaves": [leaf.to_dict() for leaf in self.leaves],
            "constants": {name: _plain(value) for name, value in self.constants.items()},
            "dimensions": [dimension.to_dict() for dimension in self.dimensions.values()],
            "parameters": list(self._parameters),
            "signatures": sorted(self._signatures),
            "example": {"args": _described(example.args), "kwargs": _described(example.kwargs)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputSpec:
        """The inverse of `to_dict`; calls that are drawn have plain containers where a library's class was.

        Raises:
            ValueError: an argument is neither a tensor, a JSON value nor a plain container of these.
        """
        leaves = tuple(LeafSpec.from_dict(leaf) for leaf in data["leaves"])
        dimensions = [Dimension.from_dict(dimension) for dimension in data["dimensions"]]
        example = Call(_rebuilt(data["example"]["args"]), _rebuilt(data["example"]["kwargs"]))
        parameters = tuple(data["parameters"])
        by_name = {leaf.name: leaf for leaf in leaves}

        def placed(kind: str, values: Any) -> Any:
            return tree.rebuild(
                values, lambda path, leaf: _stand_in(leaf, by_name.get(leaf_name((kind, *path), parameters)))
            )

        return cls(
            leaves,
            dict(data["constants"]),
            {dimension.name: dimension for dimension in dimensions},
            (Call(placed("args", example.args), placed("kwargs", example.kwargs)),),
            parameters,
            frozenset(data["signatures"]),
        )


def _digest(signature: Any) -> str:
    return hashlib.sha256(repr(signature).encode()).hexdigest()


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def _described(value: Any) -> Any:
    """Containers and constants as JSON; a tensor by its metadata."""
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    items = tree.children(value)
    if items is None:
        if isinstance(value, (bool, int, float, str, type(None))):
            return {"constant": value}
        return {"opaque": f"{type(value).__module__}.{type(value).__qualname__}"}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_described(child) for _, child in items]}
    return {"dict": {str(key): _described(child) for key, child in items}}


def _rebuilt(data: Mapping[str, Any]) -> Any:
    ((kind, content),) = ((key, value) for key, value in data.items() if key != "shape")
    if kind == "tensor":
        return torch.empty(data["shape"], dtype=getattr(torch, content), device="meta")
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: _rebuilt(child) for key, child in content.items()}
    if kind in ("list", "tuple"):
        return tuple(map(_rebuilt, content)) if kind == "tuple" else list(map(_rebuilt, content))
    raise ValueError(
        f"the stored call holds a {content}, which is not stored; build the spec from example calls"
    )


def _stand_in(leaf: Any, spec: LeafSpec | None) -> Any:
    """A tensor of the stored shape and strides; its values are never read."""
    if not isinstance(leaf, torch.Tensor) or spec is None:
        return leaf
    return torch.empty_strided(spec.shape, spec.strides, dtype=spec.dtype, device="meta").requires_grad_(
        spec.requires_grad
    )
