"""Global state that a trial may disturb: remembered, put back, and what had changed reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from kpt.globalstate import global_items, put_back, same
from kpt.judge.modelstate import ModelState

__all__ = ["Changes", "ModelState", "Snapshot", "untouched"]


@dataclass
class Changes:
    """What a block had changed, by name, filled when it ends. ``stuck`` could not be put back."""

    names: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


class Snapshot:
    """All global state that `restore` puts back exactly.

    Random states (Python, NumPy if imported, every device in use), default dtype and device, gradient
    mode, autocast, deterministic and precision flags, backend flags, thread counts, compiler
    configuration, modes, hooks of all modules, warning filters, logging's threshold, the garbage collector,
    handlers of Ctrl-C and SIGTERM, environment, working directory, standard streams, hooks of uncaught errors
    and the program's arguments.
    """

    def __init__(self) -> None:
        self._items = global_items()
        self._values = [item.read() for item in self._items]
        self._inference = torch.is_inference_mode_enabled()
        self._interop = torch.get_num_interop_threads()

    def differences(self) -> list[str]:
        """The names of what differs from the snapshot now."""
        changed = [
            item.name
            for item, value in zip(self._items, self._values, strict=True)
            if not same(item.read(), value)
        ]
        return changed + self._stuck()

    def restore(self) -> Changes:
        """Put everything back and report what had changed."""
        stuck = self._stuck()
        changed, still = put_back(self._items, self._values)
        return Changes(changed, stuck + still)

    def _stuck(self) -> list[str]:
        stuck = []
        if torch.is_inference_mode_enabled() != self._inference:
            stuck.append("inference mode")  # a guard that was entered and not left; only its owner can
        if torch.get_num_interop_threads() != self._interop:
            stuck.append("interop threads")  # torch lets them be set once
        return stuck


@contextmanager
def untouched() -> Iterator[Changes]:
    """Run a block and put global state back afterwards, whatever the block raises.

    Yields a `Changes` that names what the block had changed once it has ended.
    """
    changes = Changes()
    snapshot = Snapshot()
    try:
        yield changes
    finally:
        found = snapshot.restore()
        changes.names, changes.stuck = found.names, found.stuck
