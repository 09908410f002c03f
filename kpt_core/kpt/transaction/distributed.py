"""Several processes: one decides, all do the same.

Rank 0 searches while the others wait; then every rank applies the same recipe, and if one of them
cannot, or cannot even observe its model, none does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside a data-parallel wrapper, which is what gets optimised."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


class Ranks:
    """The three steps that all ranks take together, each exactly once and in this order.

    A rank that fails on its way takes the steps that are left when it leaves, with "no", so that no other
    waits for it in vain.
    """

    def __init__(self, among: Any) -> None:
        self._among = among
        self._pending = ["ready", "share", "done"]

    def ready(self, ok: bool) -> bool:
        """Whether every rank is ready to decide; if one is not, there is nothing left to do together."""
        self._pending.remove("ready")
        agreed = all_agree(ok, self._among)
        if not agreed:
            self._pending.clear()
        return agreed

    def share(self, data: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's ``data``, on every rank."""
        self._pending.remove("share")
        return broadcast(data, self._among)

    def done(self, ok: bool) -> bool:
        """Whether every rank did what was decided."""
        self._pending.remove("done")
        return all_agree(ok, self._among)

    def leave(self) -> None:
        with contextlib.suppress(RuntimeError):  # another rank is gone: nobody waits any more
            if "ready" in self._pending:
                self.ready(False)
            if "share" in self._pending:
                self.share(None)
            if "done" in self._pending:
                self.done(False)


@contextlib.contextmanager
def ranks(budget: float) -> Iterator[Ranks | None]:
    """All ranks, whose waiting ends well after the budget; None for one process."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        yield None
        return
    among = dist.new_group(backend="gloo", timeout=timedelta(seconds=2.0 * budget + 120.0))
    together = Ranks(among)
    try:
        yield together
    finally:
        try:
            together.leave()
        finally:
            dist.destroy_process_group(among)


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
