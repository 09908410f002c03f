"""Rows and heads that lie 2**30 elements apart, so that the third begins where 32 bits end.

The interpreter computes addresses in the widths that a compiled kernel has. The memory is address space
alone, but for the rows. There is as much before the first row as behind it: an offset that wraps around reads
zeros.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpt_plugin_triton import activations, glu, losses, norms, norms_fp8, quantise, skinny, softmax
from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.block_sparse import attention_block_sparse
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.embedding import embedding_sum_norm
from kpt_plugin_triton.group_norm import group_norm
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.linear_losses import linear_cross_entropy
from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
from kpt_plugin_triton.rope import rope

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="takes address space, which a GPU has no more of than memory"
)
STEP = 2**30
_NO_RESERVE = 0x4000  # MAP_NORESERVE on Linux; Python has a name for it from 3.13 on
DTYPE = torch.float16


def apart(values: torch.Tensor) -> torch.Tensor:
    """A copy of ``values`` whose first dimension has the stride `STEP`."""
    below = 2 * STEP
    size = (below + (values.shape[0] - 1) * STEP + values[0].numel()) * values.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space of {size / 2**30:.0f} GiB: {error}")
    flat = torch.frombuffer(memory, dtype=values.dtype)
    strides = (STEP, *values[0].contiguous().stride())
    return flat[below:].as_strided(values.shape, strides).copy_(values)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


ROWS = drawn(3, 64)
HEADS = drawn(3, 2, 8, 32)
ANGLES = torch.cat([torch.linspace(0, 3, 8 * 16).view(1, 8, 16)] * 2, -1)
COS, SIN = ANGLES.cos().to(DTYPE), ANGLES.sin().to(DTYPE)
VECTOR = drawn(64, seed=9)
LABELS = torch.tensor([3, 60, 7])
FIRST = torch.tensor([2, 0, 2, 1])

#: What is called with the first argument far apart, and that argument.
CALLS: dict[str, tuple[Callable[[torch.Tensor], Any], torch.Tensor]] = {
    "rms_norm": (lambda x: norms.rms_norm(x, VECTOR), ROWS),
    "layer_norm": (lambda x: norms.layer_norm(x, VECTOR, VECTOR), ROWS),
    "add_rms_norm": (lambda x: norms.add_rms_norm(x, x, VECTOR), ROWS),
    "softmax": (softmax.softmax, ROWS),
    # Its gradient counts tiles in 64 bits where a compiler sees it, which the interpreter's loops do not; the
    # compiled form is looked at in test_aot.py.
    "cross_entropy": (lambda x: losses.cross_entropy(x.detach(), LABELS, reduction="none"), ROWS),
    "linear_cross_entropy": (
        lambda x: linear_cross_entropy(x, ROWS.repeat(30, 1), LABELS, reduction="none"),
        ROWS,
    ),
    "glu": (lambda x: glu.glu(x, x), ROWS),
    "bias_activation": (lambda x: activations.bias_activation(x, VECTOR), ROWS),
    "group_norm": (lambda x: group_norm(x, 2, VECTOR[:8], VECTOR[:8]), drawn(3, 8, 4, 4)),
    "rope": (lambda x: rope(x, x, COS, SIN), HEADS),
    "qk_norm_rope": (lambda x: qk_norm_rope(x, x, VECTOR[:32], VECTOR[:32], COS, SIN), HEADS),
    "attention": (lambda x: attention(x, x, x, is_causal=True), HEADS),
    "attention, heads far apart": (lambda x: attention(x[None], x[None], x[None]), HEADS[:, 0]),
    "attention, a mask": (
        lambda x: attention(HEADS.detach(), HEADS.detach(), HEADS.detach(), mask=x.detach()),
        drawn(3, 1, 8, 8),
    ),
    "attention_block_sparse": (
        lambda x: attention_block_sparse(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.bool)),
        HEADS,
    ),
    "decode_attention": (lambda x: decode_attention(HEADS[:, :, :1], x.detach(), x.detach()), HEADS),
    "embedding_sum_norm": (lambda x: embedding_sum_norm(FIRST, x, weight=VECTOR, bias=VECTOR), ROWS),
    "linear, rows": (lambda x: skinny.linear(x.detach(), ROWS), ROWS),
    "linear, one row": (lambda x: skinny.linear(x.detach()[-1:], ROWS), ROWS),
    "linear, a weight": (lambda x: skinny.linear(ROWS[:2], x.detach()), ROWS),
    "linear_int8": (
        lambda x: skinny.linear_int8(ROWS[:2], x, torch.ones(3)),
        (ROWS * 20).to(torch.int8),
    ),
    "quantise_fp8": (lambda x: quantise.quantise_fp8(x.detach(), "row")[0].float(), ROWS),
    "silu_mul_fp8": (lambda x: quantise.silu_mul_fp8(x.detach(), x.detach(), "row")[0].float(), ROWS),
    "rms_norm_fp8": (lambda x: norms_fp8.rms_norm_fp8(x.detach(), VECTOR, mode="row")[0].float(), ROWS),
}


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_those_of_dense_tensors(name: str) -> None:
    run, values = CALLS[name]
    for mine, true in zip(_everything(run, apart(values), apart), _everything(run, values, torch.clone)):
        torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


def _everything(
    run: Callable[[torch.Tensor], Any], x: torch.Tensor, laid: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs, and the gradient of ``x`` for upstream ones that ``laid`` lays out."""
    x = x.detach()
    if x.is_floating_point():
        x.requires_grad_()
    found = run(x)
    outs = list(found) if isinstance(found, tuple) else [found]
    if not any(out.requires_grad for out in outs):
        return outs
    upstream = [drawn(*out.shape, seed=5).to(out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, [x], [laid(grad) if grad.dim() > 1 else grad for grad in upstream])
    return [*(out.detach() for out in outs), *grads]
