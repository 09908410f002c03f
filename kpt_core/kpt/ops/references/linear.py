"""linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kpt.ops.binding import Hypothesis
from kpt.ops.hypotheses import attribute, only_tensor, own_parameters
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` with ``x`` (..., K), ``weight`` (N, K) and ``bias`` (N,)."""
    return torch.nn.functional.linear(x, weight, bias)


class Linears:
    """Proposes linear for a module with one matrix, stored either way round, and at most one vector."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        parameters = own_parameters(module)
        if found is None or not 1 <= len(parameters) <= 2 or not found[1].shape:
            return
        x, seen = found
        matrices = [name for name, value in parameters.items() if value.dim() == 2]
        vectors = [name for name, value in parameters.items() if value.dim() == 1]
        output = getattr(captured.output, "shape", None)
        if len(matrices) != 1 or len(vectors) != len(parameters) - 1 or output is None:
            return
        shape = parameters[matrices[0]].shape
        weight = attribute(matrices[0])
        bias = {"bias": attribute(vectors[0])} if vectors else {}
        if output != (*seen.shape[:-1], output[-1] if output else -1):
            return
        if (output[-1], seen.shape[-1]) == tuple(shape):
            yield Hypothesis("linear", {"x": x, "weight": weight, **bias})
        if (seen.shape[-1], output[-1]) == tuple(shape):
            yield Hypothesis("linear", {"x": x, "weight": f"{weight}.t()", **bias})


_HOME = "kpt.ops.references.linear"
SPECS = (
    OpSpec(
        "linear",
        "(x, weight, bias=None) -> y",
        f"{_HOME}:linear",
        f"{_HOME}:Linears",
        "matrix product with a weight (N, K), plus a bias",
    ),
)
