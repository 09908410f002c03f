"""gated_mlp (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kpt.ops.binding import Hypothesis
from kpt.ops.hypotheses import attribute, only_tensor, own_parameters
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured

#: Activations by the name that kernels receive.
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """``down(activation(gate(x)) * up(x))``: x (..., H), gate and up (I, H), down (H, I), each with a bias.

    ``activation`` is one of silu, gelu, gelu_tanh and relu; others raise `ValueError`.
    """
    act = ACTIVATIONS.get(activation)
    if act is None:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    hidden = act(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(hidden, down_weight, down_bias)


class GatedMLPs:
    """Proposes gated_mlp for a module with two matrices up (or a fused one) and one down."""

    def hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        found = only_tensor(captured)
        output = getattr(captured.output, "shape", None)
        parameters = own_parameters(module)
        if found is None or output != found[1].shape or not 2 <= len(parameters) <= 6 or not output:
            return
        x, hidden = found[0], found[1].shape[-1]
        matrices = {name: tuple(value.shape) for name, value in parameters.items() if value.dim() == 2}
        vectors = {name: value.numel() for name, value in parameters.items() if value.dim() == 1}
        if len(matrices) + len(vectors) != len(parameters):
            return
        for weights in _weights(matrices, hidden):
            biases = _biases(weights, vectors)
            if biases is None:
                continue
            for activation in ACTIVATIONS:
                yield Hypothesis("gated_mlp", {"x": x, **weights, **biases, "activation": repr(activation)})


def _weights(matrices: dict[str, tuple[int, ...]], hidden: int) -> Iterator[dict[str, str]]:
    names = list(matrices)
    if len(names) == 3:
        for gate, up, down in permutations(names):
            inner = matrices[gate][0]
            if matrices[gate] == matrices[up] == (inner, hidden) and matrices[down] == (hidden, inner):
                yield {
                    "gate_weight": attribute(gate),
                    "up_weight": attribute(up),
                    "down_weight": attribute(down),
                }
    elif len(names) == 2:
        for fused, down in permutations(names):
            inner = matrices[fused][0] // 2
            if matrices[fused] == (2 * inner, hidden) and matrices[down] == (hidden, inner):
                for first, second in ((0, 1), (1, 0)):
                    yield {
                        "gate_weight": f"{attribute(fused)}.chunk(2)[{first}]",
                        "up_weight": f"{attribute(fused)}.chunk(2)[{second}]",
                        "down_weight": attribute(down),
                    }


def _biases(weights: dict[str, str], vectors: dict[str, int]) -> dict[str, str] | None:
    """Each matrix's bias is the vector beside it; None when a vector belongs to no matrix."""
    beside = {attribute(name).rpartition(".")[0]: attribute(name) for name in vectors}
    found = {}
    used = set()
    for name, text in weights.items():
        matrix, chunk, which = text.partition(".chunk")
        owner = matrix.rpartition(".")[0]
        if owner in beside:
            used.add(owner)
            found[name.replace("weight", "bias")] = beside[owner] + chunk + which
    return found if len(used) == len(vectors) else None


_HOME = "kpt.ops.references.mlp"
SPECS = (
    OpSpec(
        "gated_mlp",
        "(x, gate_weight, up_weight, down_weight, gate_bias=None, up_bias=None, down_bias=None, "
        "activation='silu') -> y",
        f"{_HOME}:gated_mlp",
        f"{_HOME}:GatedMLPs",
        "down(activation(gate(x)) * up(x))",
    ),
)
