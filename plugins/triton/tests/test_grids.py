"""Grids of launches: CUDA takes 2**31 - 1 programs in the first dimension, and 65535 in the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton import (
    activations,
    embedding,
    glu,
    group_norm,
    linear_losses,
    losses,
    norms,
    qk_norm_rope,
    quantise,
    rope,
    softmax,
)
from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.launch import Kernel, recording

#: More sequences or rows than the second dimension of a grid has room for.
MANY = 70000


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def numbers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def heads(length: int) -> torch.Tensor:
    return empty(MANY, 2, length, 64)


CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: attention(heads(16), heads(16), heads(16), is_causal=True),
    "attention of blocks": lambda: attention_block_sparse(
        heads(32), heads(32), heads(32), empty(MANY, 2, 2, 2, dtype=torch.bool)
    ),
    "decode_attention": lambda: decode_attention(*(heads(n).detach() for n in (1, 700, 700))),
    "rms_norm": lambda: norms.rms_norm(empty(MANY * 32, 64), empty(64)),
    "layer_norm of long rows": lambda: norms.layer_norm(empty(MANY, 40000), empty(40000), empty(40000)),
    "softmax": lambda: softmax.softmax(empty(MANY * 32, 64)),
    "cross_entropy": lambda: losses.cross_entropy(empty(MANY * 32, 64), numbers(MANY * 32)),
    "linear_cross_entropy": lambda: linear_losses.linear_cross_entropy(
        empty(MANY, 64), empty(300, 64), numbers(MANY)
    ),
    "glu": lambda: glu.glu(empty(MANY * 32, 64), empty(MANY * 32, 64)),
    "bias_activation": lambda: activations.bias_activation(empty(MANY * 32, 64), empty(64)),
    "group_norm": lambda: group_norm.group_norm(empty(MANY, 8, 4, 4), 4),
    "group_norm, channels last": lambda: group_norm.group_norm(empty(MANY, 4, 4, 8).permute(0, 3, 1, 2), 4),
    "group_norm, channels last, in stripes": lambda: group_norm.group_norm(
        empty(MANY, 72, 72, 8).permute(0, 3, 1, 2), 2
    ),
    "rope": lambda: rope.rope(heads(8), heads(8), *(empty(1, 8, 64).detach() for _ in range(2))),
    "qk_norm_rope": lambda: qk_norm_rope.qk_norm_rope(
        heads(8), heads(8), empty(64), empty(64), *(empty(1, 8, 64).detach() for _ in range(2))
    ),
    "quantise_fp8": lambda: quantise.quantise_fp8(empty(MANY * 32, 64).detach(), "block"),
    "embedding_sum_norm": lambda: embedding.embedding_sum_norm(numbers(MANY), empty(50, 64)),
}


@pytest.mark.parametrize("name", CALLS)
def test_grids_of_many_rows_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with the options of an H200."""
    grids: list[tuple[str, tuple[int, int, int]]] = []
    launch = Kernel.__call__

    def watched(kernel: Kernel, grid: tuple[int, int, int], *call: Any) -> None:
        grids.append((kernel.function.fn.__name__, grid))
        launch(kernel, grid, *call)

    monkeypatch.setattr(Kernel, "__call__", watched)
    with recording("sm_90"):
        made = CALLS[name]()
        forward = len(grids)
        differentiable = [o for o in (made if isinstance(made, tuple) else (made,)) if o.requires_grad]
        for output in differentiable:
            output.backward(torch.empty_like(output), retain_graph=True)
    assert forward, f"{name} launched nothing"
    assert not differentiable or len(grids) > forward, f"the backward of {name} launched nothing"
    for kernel, (x, y, z) in grids:
        assert x < 2**31 and y <= 65535 and z <= 65535, f"{name}: {kernel} has the grid {x, y, z}"
