"""Tensors of more than 2**31 elements: offsets beyond 32 bits. On a GPU only."""

from __future__ import annotations

import pytest
import torch

from kpt_plugin_triton import activations, glu, losses, norms, quantise, softmax
from kpt_plugin_triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter would take hours"),
]
COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 3

CALLS = {
    "rms_norm": lambda x: norms.rms_norm(x, x[0].clone()),
    "layer_norm": lambda x: norms.layer_norm(x, x[0].clone(), x[1].clone()),
    "softmax": softmax.softmax,
    "glu": lambda x: glu.glu(x, x),
    "bias_activation": lambda x: activations.bias_activation(x, x[0].clone()),
    "quantise_fp8": lambda x: quantise.quantise_fp8(x)[0].view(torch.uint8),
}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of free memory; there are {free / 2**30:.0f}")
    return torch.randn(ROWS, COLUMNS, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CALLS)
def test_the_last_rows_are_those_of_a_small_tensor(name: str, x: torch.Tensor) -> None:
    """What lies beyond the 2**31st element is computed as it is alone."""
    run = CALLS[name]
    whole = run(x)
    small = run(torch.cat((x[:2], x[-5:])))  # the first rows are the weights
    torch.testing.assert_close(whole[-5:], small[-5:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(whole[:2], small[:2], rtol=1e-2, atol=1e-2)


def test_cross_entropy(x: torch.Tensor) -> None:
    """Losses and gradients of rows beyond the 2**31st element."""
    logits = x.detach().requires_grad_()
    target = torch.arange(ROWS, device="cuda") % COLUMNS
    each = losses.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(each[-5:].sum(), logits)
    last = x[-5:].detach().float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(last, target[-5:], reduction="none")
    torch.testing.assert_close(each[-5:].float(), expected, rtol=1e-2, atol=1e-2)
    (true,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(grad[-5:].float(), true, rtol=2e-2, atol=1e-4)
