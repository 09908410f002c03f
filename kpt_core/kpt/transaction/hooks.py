"""The user's hooks do not fire for what kpt does: a run calls the model hundreds of times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules import module as torch_module


def global_hooks() -> bool:
    """Whether somebody listens to every module of the process: an optimised forward runs few of them."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


@contextmanager
def silent(model: torch.nn.Module) -> Iterator[None]:
    """Keep hooks of the model's tensors from firing inside the block.

    A workspace shares the user's parameters, so that each gradient taken in a trial would pass through
    them. Autograd reads the very dictionary that a hook is registered in: it is emptied and filled again.
    """
    kept: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
    try:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            table = tensor._backward_hooks
            if table:
                kept.append((table, dict(table)))
                table.clear()
        yield
    finally:
        for table, hooks in kept:
            added = {key: hook for key, hook in table.items() if key not in hooks}
            table.clear()
            table.update({**hooks, **added})
