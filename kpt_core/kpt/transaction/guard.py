"""Which inputs a committed plan serves: those it was proven for, and declared dynamic sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from kpt.judge import tree
from kpt.judge.layouts import layout_of

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.judge.draws import InputSpec


#: The leaves by name, and the structure of each argument.
_Form: TypeAlias = "tuple[list[tuple[str, Any]], dict[str, Any]]"


class InputGuard:
    """Compares a call with the example calls.

    Two calls agree if their structure, constants, dtypes, devices, ranks, memory layouts and static
    sizes agree; dimensions of one name have one size within the declared range. In training, an input
    that requires a gradient does not agree with one whose gradient was not judged.
    """

    def __init__(self, calls: list[Call], spec: InputSpec, *, training: bool = False) -> None:
        self.spec = spec
        self.training = training
        self.dims = {leaf.name: dict(leaf.dims) for leaf in spec.leaves}
        self.ranges = {
            name: (dim.low, dim.high if dim.declared else None) for name, dim in spec.dimensions.items()
        }
        self.forms = [self._form(call.args, call.kwargs) for call in calls]
        #: By example, the arguments passed by name that hold no data.
        self.constants = [{n: v for n, v in call.kwargs.items() if tree.is_atom(v)} for call in calls]

    def misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the call is outside of what was proven, or None."""
        form = self._form(args, kwargs)
        reasons = [self._difference(form, known) for known in self.forms]
        if None in reasons:
            return None
        # The example that comes closest explains best: structural reasons sort before sizes.
        return min(reasons, key=lambda reason: reason[0])[1] if reasons else "no example inputs"  # type: ignore[index]

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Form:
        named = dict(sorted(kwargs.items()))
        positional = [(("args", *path), leaf) for path, leaf in tree.walk(args)]
        by_keyword = [(("kwargs", *path), leaf) for path, leaf in tree.walk(named)]
        leaves = [(self.spec.name_of(path), _describe(leaf)) for path, leaf in (*positional, *by_keyword)]
        paths = (
            *((("args", i), v) for i, v in enumerate(args)),
            *((("kwargs", k), v) for k, v in named.items()),
        )
        return leaves, {self.spec.name_of(path): tree.structure(value) for path, value in paths}

    def _difference(self, form: _Form, known: _Form) -> tuple[int, str] | None:
        (leaves, containers), (known_leaves, known_containers) = form, known
        names, known_names = [n for n, _ in leaves], [n for n, _ in known_leaves]
        if names != known_names:
            return 3, f"the arguments differ: got {', '.join(names)}; proven for {', '.join(known_names)}"
        sizes: dict[str, int] = {}
        for (name, got), (_, want) in zip(leaves, known_leaves):
            if not isinstance(got, _TensorForm) or not isinstance(want, _TensorForm):
                # 1, 1.0 and True are equal, as are 0.0 and -0.0.
                if type(got) is not type(want) or got != want or _sign(got) != _sign(want):
                    return 2, f"argument {name!r} is {got!r}; proven for {want!r}"
                continue
            for field in ("dtype", "device", "contiguous", "kind", "conjugate", "negative"):
                if getattr(got, field) != getattr(want, field):
                    return (
                        2,
                        f"{field} of {name!r} is {getattr(got, field)}; proven for {getattr(want, field)}",
                    )
            if len(got.shape) != len(want.shape):
                return 2, f"rank of {name!r} is {len(got.shape)}; proven for {len(want.shape)}"
            dims = self.dims.get(name, {})
            for axis, (size, proven) in enumerate(zip(got.shape, want.shape)):
                dim = dims.get(axis)
                if dim is None:
                    if size != proven:
                        return 1, (
                            f"dimension {axis} of {name!r} is {size}; proven for {proven} "
                            "(declare it in dynamic_shapes to serve other sizes)"
                        )
                    continue
                low, high = self.ranges.get(dim, (1, None))
                if size < low or (high is not None and size > high):
                    return 1, f"{dim} = {size} is outside of the declared range {low} to {high}"
                if sizes.setdefault(dim, size) != size:
                    return 1, f"{dim} is {size} in {name!r} and {sizes[dim]} elsewhere"
            if not got.contiguous and got.layout(bool(dims)) != want.layout(bool(dims)):
                return 2, f"{name!r} has the strides {list(got.strides)}; proven for {list(want.strides)}"
            if self.training and got.requires_grad and not want.requires_grad:
                return 2, f"{name!r} requires a gradient; proven without"
        # A list and a tuple of the same tensors have the same leaves, and one that is empty has none.
        for name in (*containers, *known_containers):
            if containers.get(name) != known_containers.get(name):
                return 3, f"argument {name!r} is of another structure than proven"
        return None


class _TensorForm:
    __slots__ = (
        "conjugate",
        "contiguous",
        "device",
        "dtype",
        "kind",
        "negative",
        "requires_grad",
        "shape",
        "strides",
    )

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = type(tensor) if type(tensor) is not torch.nn.Parameter else torch.Tensor
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.shape = tuple(tensor.shape)
        self.contiguous = tensor.is_contiguous()
        self.strides = tensor.stride()
        self.requires_grad = tensor.requires_grad
        #: Memory holds the conjugate, or the negative, of the values.
        self.conjugate, self.negative = tensor.is_conj(), tensor.is_neg()

    def layout(self, dynamic: bool) -> Any:
        """The strides; what they are like where sizes, and strides with them, vary from call to call."""
        return layout_of(self.shape, self.strides) if dynamic else self.strides

    def __repr__(self) -> str:
        return f"a {str(self.dtype).removeprefix('torch.')} tensor of shape {list(self.shape)}"


def _sign(value: Any) -> tuple[float, ...]:
    """Those of a number's parts: 0.0 and -0.0 are equal, and what is divided by them is not."""
    if isinstance(value, complex):
        return (math.copysign(1.0, value.real), math.copysign(1.0, value.imag))
    return (math.copysign(1.0, value),) if isinstance(value, float) else ()


def _describe(leaf: Any) -> Any:
    return _TensorForm(leaf) if isinstance(leaf, torch.Tensor) else leaf
