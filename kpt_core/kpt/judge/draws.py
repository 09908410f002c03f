"""Fresh inputs like the examples: what varies from call to call, and how to draw it again."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from kpt.judge import forms, tree
from kpt.judge.calls import Call, copied_leaf
from kpt.judge.dimensions import Dimension, declared_axes, drawn_sizes, observe_dimensions
from kpt.judge.layouts import laid_out, scaled_strides

Role = Literal["mask", "integer", "float", "bool"]


@dataclass(frozen=True)
class LeafSpec:
    """One tensor input.

    ``name`` is the parameter's name, with the path inside it (``past.layers[0].keys``); ``shape`` the
    first example's; ``dims`` the dimension's name by dynamic axis; ``low`` and ``high`` bound the
    observed values.
    """

    name: str
    path: tree.Path
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dims: dict[int, str]
    role: Role
    form: forms.Form
    requires_grad: bool = False

    @property
    def low(self) -> float:
        return self.form.low

    @property
    def high(self) -> float:
        return self.form.high

    def to_dict(self) -> dict[str, Any]:
        """The leaf as JSON values."""
        return {
            "name": self.name,
            "path": list(self.path),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "shape": list(self.shape),
            "strides": list(self.strides),
            "dims": {str(axis): name for axis, name in self.dims.items()},
            "role": self.role,
            "form": asdict(self.form),
            "requires_grad": self.requires_grad,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LeafSpec:
        """The inverse of `to_dict`."""
        form: dict[str, Any] = {
            key: tuple(tuple(item) if isinstance(item, list) else item for item in value)
            if isinstance(value, (list, tuple))
            else value
            for key, value in data["form"].items()
        }
        return cls(
            name=data["name"],
            path=tuple(data["path"]),
            dtype=getattr(torch, data["dtype"]),
            device=torch.device(data["device"]),
            shape=tuple(data["shape"]),
            strides=tuple(data["strides"]),
            dims={int(axis): name for axis, name in data["dims"].items()},
            role=data["role"],
            form=forms.Form(**form),
            requires_grad=data["requires_grad"],
        )


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
            for path, leaf in _named_leaves(call):
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
        leaves = _observe(observed, dims)
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

    # -- drawing ------------------------------------------------------------------------------

    def draw(
        self,
        generator: torch.Generator,
        *,
        sizes: Mapping[str, int] | None = None,
        padding: bool = False,
        keep_integers: bool = False,
    ) -> Call:
        """A fresh call like one of the examples, on the examples' devices, with their strides.

        Args:
            generator: a CPU generator; the only source of randomness.
            sizes: sizes of dynamic dimensions by name; by default those of the example at hand.
            padding: pad every sequence mask raggedly, even if no example was padded.
            keep_integers: leave integers as in the example, for models that accept few combinations.

        Raises:
            ValueError: an unknown dimension, or a spec from `from_dict` with values that cannot be drawn.
        """
        unknown = sorted(set(sizes or {}) - set(self.dimensions))
        if unknown:
            raise ValueError(
                f"unknown dimension {unknown[0]!r}; the dimensions are {', '.join(self.dimensions) or 'none'}"
            )
        example = self._examples[int(torch.randint(len(self._examples), (1,), generator=generator))]
        return _Drawing(self, example, generator, dict(sizes or {}), padding, keep_integers).call()

    def sizes(self, generator: torch.Generator, number: int) -> list[dict[str, int]]:
        """At most ``number`` assignments for `draw`: odd sizes first, then the bounds of each dimension."""
        seed = int(torch.randint(1 << 30, (1,), generator=generator))
        return drawn_sizes(self.dimensions.values(), number, random.Random(seed))

    @property
    def has_masks(self) -> bool:
        """Whether any input is a mask over [batch, sequence]."""
        return any(leaf.role == "mask" and len(leaf.shape) == 2 for leaf in self.leaves)

    def padding_masks(self, call: Call) -> dict[str, torch.Tensor]:
        """The [batch, sequence] masks of ``call`` by name, as flags of the positions that count."""
        by_name = {leaf.name: leaf for leaf in self.leaves if leaf.role == "mask"}
        masks = {}
        for path, tensor in _named_leaves(call):
            leaf = by_name.get(self.name_of(path))
            if leaf is not None and isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                masks[leaf.name] = forms.keep_flags(tensor, leaf.form.kept)
        return masks

    # -- recognising calls ----------------------------------------------------------------------

    def signature(self, call: Call) -> Any:
        """What a plan may depend on besides sizes of dynamic dimensions, as a hashable value."""
        dims = {leaf.name: leaf.dims for leaf in self.leaves}
        parts: list[Any] = [tree.structure(call.args), tree.structure(call.kwargs)]
        for path, leaf in _named_leaves(call):
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
        for path, leaf in _named_leaves(call):
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


class _Drawing:
    """One draw: masks first, since ids and labels follow them."""

    def __init__(
        self,
        spec: InputSpec,
        example: Call,
        generator: torch.Generator,
        sizes: dict[str, int],
        padding: bool,
        keep_integers: bool,
    ) -> None:
        self.spec, self.example, self.generator = spec, example, generator
        self.padding, self.keep_integers = padding, keep_integers
        self.leaves = {leaf.name: leaf for leaf in spec.leaves}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bounds: dict[int, list[tuple[str, int]]] = {}
        for path, tensor in _named_leaves(example):
            if isinstance(tensor, torch.Tensor):
                leaf = self.leaves[spec.name_of(path)]
                shape = tuple(
                    sizes.get(leaf.dims.get(axis, ""), size) for axis, size in enumerate(tensor.shape)
                )
                self.shapes[leaf.name] = shape
                for axis, size in enumerate(tensor.shape):
                    if tensor.dim() >= 2:
                        self.bounds.setdefault(size, []).append((leaf.name, axis))
        sides = sorted({side for leaf in spec.leaves for side in leaf.form.sides}) or ["right"]
        self.side = sides[int(torch.randint(len(sides), (1,), generator=generator))]
        self.lengths: dict[tuple[int, int], torch.Tensor] = {}
        self.keeps: dict[tuple[int, ...], torch.Tensor] = {}

    def call(self) -> Call:
        drawn: dict[int, torch.Tensor] = {}
        named = [(path, leaf) for path, leaf in _named_leaves(self.example) if isinstance(leaf, torch.Tensor)]
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
        return self.leaves[self.spec.name_of(path)]

    def _values(self, leaf: LeafSpec, tensor: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[leaf.name]
        if leaf.role == "mask":
            keep = self._keep(leaf, tensor, shape)
            if keep.dim() == 2:
                self.keeps[tuple(shape)] = keep
            kept = torch.tensor(leaf.form.kept, dtype=leaf.dtype)
            return torch.where(keep, kept, torch.tensor(leaf.form.dropped, dtype=leaf.dtype))
        if leaf.role == "bool":
            return torch.rand(shape, generator=self.generator) < leaf.form.mean
        if leaf.role == "integer":
            if self.keep_integers:
                return forms.stretch(tensor, shape)
            return forms.draw_integers(
                leaf.form,
                shape,
                self.generator,
                example=tensor,
                keep=self.keeps.get(tuple(shape)),
                bound=self._bound(leaf, tensor),
            )
        values = forms.draw_floats(leaf.form, shape, self.generator)
        if leaf.dtype.is_complex:
            return torch.complex(values, forms.draw_floats(leaf.form, shape, self.generator))
        return values

    def _keep(self, leaf: LeafSpec, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        padded = leaf.form.kind == "padded" or (leaf.form.kind == "causal" and bool(leaf.form.sides))
        lengths = None
        if len(shape) >= 2 and (padded or (self.padding and _is_sequence_mask(leaf.name))):
            key = (shape[0], shape[-1])
            if key not in self.lengths and (len(shape) == 2 or padded or self.padding):
                share = leaf.form.share if padded and leaf.form.share < 1.0 else 0.4
                self.lengths[key] = forms.ragged_lengths(*key, share, self.generator)
            lengths = self.lengths.get(key)
        return forms.draw_mask(
            leaf.form, shape, self.generator, example=tensor, lengths=lengths, side=self.side
        )

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


def _is_sequence_mask(name: str) -> bool:
    """Whether a mask's last axis is a sequence that may be padded, by the names that are in use."""
    last = name.rsplit(".", 1)[-1].lower()
    return last == "mask" or any(part in last for part in ("attention_mask", "attn_mask", "padding_mask"))


def _observe(
    observed: Mapping[str, Sequence[tuple[tree.Path, torch.Tensor, int]]], dims: Mapping[str, dict[int, str]]
) -> tuple[LeafSpec, ...]:
    masks: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    found: dict[str, forms.Form] = {}
    for name, seen in observed.items():
        if "mask" not in name.lower() or seen[0][1].is_complex() or seen[0][1].numel() == 0:
            continue
        form = forms.observe_mask(name, [tensor for _, tensor, _ in seen])
        if form is None:
            continue
        found[name] = form
        for _, tensor, number in seen:
            if tensor.dim() == 2 and form.kind in ("ones", "padded"):
                masks.setdefault((number, tuple(tensor.shape)), forms.keep_flags(tensor, form.kept))
    unmasked = [name for name in observed if name not in found]
    leaves = []
    for name, seen in observed.items():
        tensors = [tensor for _, tensor, _ in seen]
        first = tensors[0]
        role: Role
        if name in found:
            role, form = "mask", found[name]
        elif first.dtype == torch.bool:
            rate = float(torch.cat([t.reshape(-1) for t in tensors]).to(torch.float64).mean())
            role, form = "bool", forms.Form("rate", mean=rate, low=0.0, high=1.0)
        elif first.is_floating_point() or first.is_complex():
            role, form = "float", forms.observe_floats(tensors)
        else:
            belonging = [masks.get((number, tuple(tensor.shape))) for _, tensor, number in seen]
            role, form = "integer", forms.observe_integers(name, tensors, belonging, len(unmasked) == 1)
        leaves.append(
            LeafSpec(
                name=name,
                path=seen[0][0],
                dtype=first.dtype,
                device=first.device,
                shape=tuple(first.shape),
                strides=tuple(first.stride()) if first.layout is torch.strided else (),
                dims=dict(dims.get(name, {})),
                role=role,
                form=form,
                requires_grad=first.requires_grad,
            )
        )
    return tuple(leaves)


def _named_leaves(call: Call) -> list[tuple[tree.Path, Any]]:
    return [
        *((("args", *path), leaf) for path, leaf in tree.walk(call.args)),
        *((("kwargs", *path), leaf) for path, leaf in tree.walk(call.kwargs)),
    ]


def positional_names(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """The names of the parameters that positional arguments bind to, as far as they have names."""
    if forward is None:
        return ()
    target = forward.forward if isinstance(forward, torch.nn.Module) else forward
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def leaf_name(path: tree.Path, parameters: Sequence[str]) -> str:
    """``("args", 0, "ids")`` as ``batch.ids`` for a forward whose first parameter is ``batch``."""
    kind, first, *rest = path
    if kind == "kwargs":
        return tree.spell((first, *rest))
    head = parameters[first] if first < len(parameters) else f"args[{first}]"
    return tree.spell((head, *rest))


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
