"""Weights and calls as safetensors: tied tensors once, containers by their structure."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.utils import _pytree as pytree

from kpt.artifact.folder import ArtifactError
from kpt.judge import tree
from kpt.judge.calls import Call


def untied(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once, and the names under which the same memory is known again."""
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(
                "extra-state",
                f"state_dict()[{name!r}] is a {type(tensor).__name__}, which safetensors cannot hold.",
                "Keep it in a buffer, or save the model by other means and call kpt.optimize after loading.",
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
            tensors[leaf["tensor"]].to(device) if "tensor" in leaf else leaf["value"]
            for leaf in described["leaves"]
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise ArtifactError(
            "damaged", f"verify/ cannot be read: {error}.", "Save the artifact again."
        ) from error
    return Call(tuple(args), dict(kwargs))


def named(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by name."""
    return {
        tree.spell(path) or "output": leaf.detach().cpu().contiguous().clone()
        for path, leaf in tree.walk(output)
        if isinstance(leaf, torch.Tensor)
    }
