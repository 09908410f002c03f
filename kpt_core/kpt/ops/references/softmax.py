"""softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.ops.binding import Hypothesis
from kpt.ops.hypotheses import names_read, only_tensor
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``exp(x) / sum(exp(x))`` along ``dim``, of the dtype of ``x``."""
    return torch.softmax(x, dim=dim)


class Softmaxes:
    """Proposes softmax for modules that could compute one, and for calls with a dimension."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        if (
            found is None
            or getattr(captured.output, "shape", None) != found[1].shape
            or list(module.parameters())
        ):
            return
        if not names_read(module) & {"softmax", "exp", "softmin", "log_softmax"}:
            return
        yield from self._dimensions(found[0], len(found[1].shape), vars(module))

    def _dimensions(self, x: str, rank: int, held: dict[str, object]) -> Iterator[Hypothesis]:
        read = {f"self.{n}": v for n, v in held.items() if type(v) is int and -rank <= v < rank}
        for text in read:
            yield Hypothesis("softmax", {"x": x, "dim": text})
        for dim in range(-rank, 0):
            if dim not in read.values() and dim + rank not in read.values():
                yield Hypothesis("softmax", {"x": x, "dim": str(dim)})

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        call = captured.calls[0]
        if found is None or getattr(captured.output, "shape", None) != found[1].shape:
            return
        x, rank = found[0], len(found[1].shape)
        cast = f"({x} if dtype is None else {x}.to(dtype))" if "dtype" in call else x
        for name, value in call.items():
            if type(value) is int and -rank <= value < rank and "dim" in name:
                yield Hypothesis("softmax", {"x": cast, "dim": name})


_HOME = "kpt.ops.references.softmax"
SPECS = (
    OpSpec(
        "softmax", "(x, dim=-1) -> y", f"{_HOME}:softmax", f"{_HOME}:Softmaxes", "softmax along one dimension"
    ),
)
