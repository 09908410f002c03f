"""One tensor input of a model, as its examples show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kpt.judge import forms, tree

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

    @property
    def may_flag(self) -> bool:
        """Whether these are integers that are all 0 or all 1 and may be flags or kinds."""
        return self.role == "integer" and forms.may_flag(self.name, self.form, self.shape)

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


def mask_of(name: str, masks: Sequence[tuple[str, torch.Tensor]]) -> torch.Tensor | None:
    """Which of the named masks of its shape the integers ``name`` follow: a decoder's ids the decoder's."""
    decoder = name.startswith("decoder")
    order = sorted(masks, key=lambda each: each[0].startswith("decoder") != decoder)
    return order[0][1] if order else None


def observe_leaves(
    observed: Mapping[str, Sequence[tuple[tree.Path, torch.Tensor, int]]], dims: Mapping[str, dict[int, str]]
) -> tuple[LeafSpec, ...]:
    """The tensor inputs, from the tensors that examples hold by name and the names of dynamic axes."""
    masks: dict[tuple[int, tuple[int, ...]], list[tuple[str, torch.Tensor]]] = {}
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
                flags = forms.keep_flags(tensor, form.kept)
                masks.setdefault((number, tuple(tensor.shape)), []).append((name, flags))
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
            belonging = [mask_of(name, masks.get((number, tuple(t.shape)), [])) for _, t, number in seen]
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
