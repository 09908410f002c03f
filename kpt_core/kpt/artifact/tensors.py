"""Weights and calls as safetensors: tied tensors once, containers by their structure."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpt.artifact.folder import ArtifactError
from kpt.judge import tree
from kpt.judge.calls import Call, span
from kpt.judge.layouts import laid_out

#: How many times as much memory as its elements an example may span that is laid out as it was.
_LARGEST_VIEW = 16


def untied(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, and the names under which the same memory is known again."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = f"{tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ArtifactError(
                "extra-state",
                f"state_dict()[{name!r}] is a {kind}, which safetensors cannot hold.",
                "Keep it in a buffer, or save the model by other means and call kpt.optimize after loading.",
            )
        if name == "__metadata__":  # of which no reader could tell that it is a tensor
            raise ArtifactError(
                "reserved-name",
                f"A tensor of the model is called {name!r}, which the safetensors format keeps for itself.",
                "Give the parameter or buffer another name.",
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept, aliases


def pack_call(call: Call) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """A call as tensors and a JSON structure, or None if it holds something JSON cannot describe."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    tensors: dict[str, torch.Tensor] = {}
    described: list[Any] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            tensors[f"leaf{index}"] = leaf.detach().cpu().contiguous().clone()
            described.append({"tensor": f"leaf{index}", "strides": list(leaf.stride())})
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append({"value": leaf})
        else:
            return None
    try:
        structure = pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError):  # a container that only its library knows
        return None
    return tensors, {"structure": structure, "leaves": described}


def unpack_call(tensors: dict[str, torch.Tensor], described: dict[str, Any], device: torch.device) -> Call:
    """The inverse of `pack_call`."""
    try:
        spec = pytree.treespec_loads(described["structure"])
        leaves = [
            _as_it_was(tensors[leaf["tensor"]], leaf["strides"]).to(device)
            if "tensor" in leaf
            else leaf["value"]
            for leaf in described["leaves"]
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise ArtifactError(
            "damaged", f"verify/ cannot be read: {error}.", "Save the artifact again."
        ) from error
    return Call(tuple(args), dict(kwargs))


def _as_it_was(values: torch.Tensor, strides: Any) -> torch.Tensor:
    """``values`` in the memory layout that the example had, with which the plan was proved.

    Of a view of something far larger the values are enough: a plan for contiguous ones serves no others.
    """
    if not isinstance(strides, list) or not all(type(stride) is int and stride >= 0 for stride in strides):
        raise ValueError(f"strides are {strides!r}")
    if len(strides) != values.dim():
        raise ValueError(f"{values.dim()} dimensions have {len(strides)} strides")
    small = span(values.shape, strides) <= _LARGEST_VIEW * values.numel()
    return laid_out(values, strides) if small else values


def named(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by name."""
    return {
        tree.spell(path) or "output": leaf.detach().cpu().contiguous().clone()
        for path, leaf in tree.walk(output)
        if isinstance(leaf, torch.Tensor)
    }
