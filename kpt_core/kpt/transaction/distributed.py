"""Several processes: one decides, all do the same.

Rank 0 searches while the others wait; then every rank applies the same recipe, and if one of them
cannot, none does.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside a data-parallel wrapper, which is what gets optimised."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def group(budget: float) -> Any | None:
    """A process group of all ranks whose waiting ends well after the budget; None for one process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=2.0 * budget + 120.0))


def rank() -> int:
    return torch.distributed.get_rank()


def broadcast(data: dict[str, Any] | None, among: Any) -> dict[str, Any] | None:
    """Rank 0's JSON value on every rank. JSON and no pickle: a recipe is data on the wire too."""
    dist = torch.distributed
    payload = json.dumps(data, default=str).encode() if rank() == 0 else b""
    size = torch.tensor([len(payload)], dtype=torch.int64)
    dist.broadcast(size, src=0, group=among)
    buffer = torch.zeros(int(size), dtype=torch.uint8)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
    dist.broadcast(buffer, src=0, group=among)
    value = json.loads(bytes(buffer.tolist()).decode())
    return value if isinstance(value, dict) else None


def all_agree(ok: bool, among: Any) -> bool:
    """Whether every rank is ok."""
    flag = torch.tensor([1 if ok else 0], dtype=torch.int64)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=among)
    return bool(flag.item())
