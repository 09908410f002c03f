"""The user's model and the process are put back after each trial, and what had changed is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kpt.judge.codestate import CodeState
from kpt.judge.state import ModelState, untouched

if TYPE_CHECKING:
    import torch


class Safekeeping:
    """What is kept of ``model`` and of the code that all models share, as they were.

    ``damage`` names what trials changed of the model, ``patched`` the code that they exchanged. What the
    eager forward itself changes by being called, ``eager_changes``, is put back, and no pass is blamed for
    it.
    """

    def __init__(self, model: torch.nn.Module, state: ModelState) -> None:
        self.state = state
        self.damage: list[str] = []
        self.patched: list[str] = []
        self.eager_changes = frozenset(state.differences())
        if self.eager_changes:
            state.restore()
        self._code = CodeState(model)

    def damage_since(self, index: int) -> str:
        """What trials changed of the user's model, from the ``index``-th finding on."""
        return "it changed the user's model: " + ", ".join(sorted(set(self.damage[index:]))[:4])

    def patches_since(self, index: int) -> str:
        """What code trials exchanged for the whole process, from the ``index``-th finding on."""
        return "it changed code that all models share: " + ", ".join(sorted(set(self.patched[index:]))[:4])

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Global state and the model's tensors are put back when the block ends; its modules are changed on
        purpose."""
        try:
            with untouched():
                yield
        finally:
            self._mend(self.state.tensor_differences(), self.state.restore_tensors)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Global state, shared code and the user's model are put back, however the block ends."""
        try:
            with untouched():
                yield
        finally:
            exchanged = self._code.differences()
            if exchanged:
                self.patched.extend(exchanged)
                self._code.restore()
            self._mend(self.state.differences(), self.state.restore)

    def _mend(self, differences: list[str], restore: Callable[[], list[str]]) -> None:
        if not differences:
            return
        self.damage.extend(name for name in differences if name not in self.eager_changes)
        lost = restore()
        if not lost:
            return
        large = [name for name in lost if name.rpartition(": ")[0] in self.state.unrestorable]
        if large:
            raise ModelDamaged(
                f"a plugin wrote to {', '.join(large[:4])}, which was too large to be backed up "
                "and could not be put back; load the weights again and leave that plugin out"
            )
        raise ModelDamaged(
            f"calls changed the model so that it could not be put back ({', '.join(lost[:4])}): a plugin, or "
            "its own forward, writes to what is no leaf; build it again, and leave that plugin out"
        )


class ModelDamaged(RuntimeError):
    """Something was changed that could not be put back, weights that no backup was kept of say. The only case
    in which a model is not as it was."""
