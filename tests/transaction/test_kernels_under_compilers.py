"""Kernels inside a graph that somebody compiles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import slow_kernels
from kpt.compiling import CompiledForward
from kpt.kernels import KernelBehaviour
from kpt.specs import KernelSpec


def test_other_sizes_run_the_graph_that_a_kernel_was_compiled_into() -> None:
    spec = KernelSpec(op="rms_norm", name="right", entry="slow_kernels:right", compile_safe=True)
    behaviour = KernelBehaviour(spec, sites=())
    site: Any = SimpleNamespace(name="norm")
    dispatched = behaviour._dispatched(site, slow_kernels.right)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return dispatched(x, torch.ones(8)) + 1.0

    compiled = CompiledForward(forward, backend="eager", dynamic_dims={"x": {0: "rows"}})
    for rows in (3, 5, 8, 3, 21):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), slow_kernels.right(x, torch.ones(8)) + 1.0)
    assert behaviour.verify_applied(torch.nn.Module()), "a compiler took the kernel in, which is an effect"
    assert (compiled.graphs, compiled.misses) == (1, 0)
    compiled.dispose()
