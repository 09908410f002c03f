"""Forwards whose captured graph runs as a pass leaves it, without a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kpt.compiling.collecting import FurtherInputs, collecting
from kpt.compiling.forwards import CompiledForward, GraphPass, active

_is_compiling = torch.compiler.is_compiling


class CapturedForward(CompiledForward):
    """A forward whose captured graph runs as ``graph_pass`` leaves it, without any compiler.

    A `CompiledForward` made around it, or after it in the same `collect` block, runs the pass itself,
    before its own; this object is then ``idle`` and only calls the original forward. It does so, too,
    where somebody else compiles through it.
    """

    gives_way = True

    def __init__(
        self,
        forward: Callable[..., Any],
        graph_pass: GraphPass,
        *,
        dynamic_dims: Mapping[str, Mapping[int, Any]] | None = None,
        further: FurtherInputs | None = None,
        label: str = "",
    ) -> None:
        super().__init__(
            forward,
            backend=_as_captured,
            graph_pass=graph_pass,
            dynamic_dims=dynamic_dims,
            further=further,
            label=label,
        )
        created = collecting()
        if created is not None:
            created.captured = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.idle or _is_compiling():
            return self.forward(*args, **kwargs)
        return super().__call__(*args, **kwargs)


def is_fused() -> bool:
    """Whether the code that asks is being captured for a compiler, which makes one loop of many operations.

    False in eager code, and where the captured graph runs as it is. Dynamo takes the answer for a constant.
    """
    return torch.compiler.is_compiling() and _for_a_compiler()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _for_a_compiler() -> bool:
    return not active or active[-1].backend not in ("eager", _as_captured)


def _as_captured(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    return graph.forward
