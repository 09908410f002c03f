"""Which inputs a committed plan serves: those it was proven for, and declared dynamic sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kpt.judge import tree

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.judge.draws import InputSpec


class InputGuard:
    """Compares a call with the example calls.

    Two calls agree if their structure, constants, dtypes, devices, ranks, contiguity and static
    sizes agree; dimensions of one name have one size within the declared range.
    """

    def __init__(self, calls: list[Call], spec: InputSpec) -> None:
        self.spec = spec
        self.dims = {leaf.name: dict(leaf.dims) for leaf in spec.leaves}
        self.ranges = {
            name: (dim.low, dim.high if dim.declared else None) for name, dim in spec.dimensions.items()
        }
        self.forms = [self._form(call.args, call.kwargs) for call in calls]

    def misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the call is outside of what was proven, or None."""
        form = self._form(args, kwargs)
        reasons = [self._difference(form, known) for known in self.forms]
        if None in reasons:
            return None
        # The example that comes closest explains best: structural reasons sort before sizes.
        return min(reasons, key=lambda reason: reason[0])[1] if reasons else "no example inputs"  # type: ignore[index]

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        positional = [(("args", *path), leaf) for path, leaf in tree.walk(args)]
        by_keyword = [(("kwargs", *path), leaf) for path, leaf in tree.walk(dict(sorted(kwargs.items())))]
        return [(self.spec.name_of(path), _describe(leaf)) for path, leaf in (*positional, *by_keyword)]

    def _difference(self, form: Any, known: Any) -> tuple[int, str] | None:
        leaves, known_leaves = form, known
        names, known_names = [n for n, _ in leaves], [n for n, _ in known_leaves]
        if names != known_names:
            return 3, f"the arguments differ: got {', '.join(names)}; proven for {', '.join(known_names)}"
        sizes: dict[str, int] = {}
        for (name, got), (_, want) in zip(leaves, known_leaves):
            if not isinstance(got, _TensorForm) or not isinstance(want, _TensorForm):
                if type(got) is not type(want) or got != want:  # 1, 1.0 and True are equal
                    return 2, f"argument {name!r} is {got!r}; proven for {want!r}"
                continue
            for field in ("dtype", "device", "contiguous", "kind"):
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
        return None


class _TensorForm:
    __slots__ = ("contiguous", "device", "dtype", "kind", "shape")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = type(tensor) if type(tensor) is not torch.nn.Parameter else torch.Tensor
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.shape = tuple(tensor.shape)
        self.contiguous = tensor.is_contiguous()

    def __repr__(self) -> str:
        return f"a {str(self.dtype).removeprefix('torch.')} tensor of shape {list(self.shape)}"


def _describe(leaf: Any) -> Any:
    return _TensorForm(leaf) if isinstance(leaf, torch.Tensor) else leaf
