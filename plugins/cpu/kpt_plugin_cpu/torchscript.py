"""Captured graphs as TorchScript, which is how torch hands them to oneDNN Graph and to OpenVINO."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_NO_SIZES: Mapping[int, tuple[int, int]] = {}
#: The process's own.
_UNIT = getattr(torch.jit._state, "_python_cu", None)


class Frozen(torch.nn.Module):
    """A captured graph whose inputs are tensors only.

    Those of its inputs in ``fixed``, by position, are set as attributes: a model's own weights. Those in
    ``sizes`` are numbers, and read off a tensor: {position: (position of the tensor, axis)}.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        fixed: Mapping[int, torch.Tensor],
        count: int,
        sizes: Mapping[int, tuple[int, int]] = _NO_SIZES,
    ) -> None:
        super().__init__()
        self.graph_module = graph
        self.fixed, self.sizes, self.count = fixed, sizes, count
        for index, tensor in fixed.items():
            self.register_buffer(f"fixed_{index}", tensor.detach())

    def forward(self, *inputs: torch.Tensor) -> Any:
        given: Iterator[torch.Tensor] = iter(inputs)
        values: dict[int, Any] = {
            index: getattr(self, f"fixed_{index}") if index in self.fixed else next(given)
            for index in range(self.count)
            if index not in self.sizes
        }
        values |= {index: values[source].shape[axis] for index, (source, axis) in self.sizes.items()}
        return self.graph_module(*(values[index] for index in range(self.count)))


def traced(frozen: Frozen, inputs: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    """``frozen`` in eval mode as TorchScript, for inputs like these. It dies with its last reference.

    The process's own compilation unit would keep the types and the code of all that was ever traced: 2.6 MiB
    for four layers of BERT. Meanwhile there is another.
    """
    state = torch.jit._state
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of every branch
        try:
            if _UNIT is not None:
                state._python_cu = torch._C.CompilationUnit()
            return torch.jit.trace(frozen.eval(), inputs, check_trace=False, strict=False).eval()
        finally:
            if _UNIT is not None:
                state._python_cu = _UNIT
