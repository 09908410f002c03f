"""Tensors of more than 2**31 elements: offsets beyond 32 bits. On a GPU only.

What the CPU can tell of such offsets is in test_far_apart.py and test_aot.py.
"""

from __future__ import annotations

import pytest
import torch

from kpt_plugin_triton import activations, glu, losses, norms, norms_fp8, quantise, softmax
from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.decode import decode_attention
from kpt_plugin_triton.embedding import embedding_sum_norm
from kpt_plugin_triton.group_norm import group_norm
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.linear_losses import linear_cross_entropy
from kpt_plugin_triton.qk_norm_rope import qk_norm_rope
from kpt_plugin_triton.rope import rope

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
    "rms_norm_fp8": lambda x: norms_fp8.rms_norm_fp8(x, x[0].clone())[0].view(torch.uint8),
    # Groups of a small picture each, in both layouts.
    "group_norm": lambda x: _pictures(x.view(-1, 32, 8, 16)),
    "group_norm, channels last": lambda x: _pictures(x.view(-1, 8, 16, 32).permute(0, 3, 1, 2)),
}
#: Calls whose gradients are looked at, all but the first rows of which are arguments.
DIFFERENTIABLE = {
    "rms_norm": lambda x, first: norms.rms_norm(x, first[0]),
    "layer_norm": lambda x, first: norms.layer_norm(x, first[0], first[1]),
    "add_rms_norm": lambda x, first: norms.add_rms_norm(x, x, first[0])[0],
    "softmax": lambda x, first: softmax.softmax(x),
    "glu": lambda x, first: glu.glu(x, x),
    "bias_activation": lambda x, first: activations.bias_activation(x, first[0]),
    "group_norm": lambda x, first: group_norm(x.view(-1, 32, 8, 16), 4, first[0, :32], first[1, :32]),
}
HEADS, WIDTH = 32, 128


def _pictures(x: torch.Tensor) -> torch.Tensor:
    return group_norm(x, 4, x[0, :, 0, 0].clone(), x[1, :, 0, 0].clone())


def need(gibibytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if free + held < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free memory; there are {(free + held) / 2**30:.0f}")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    need(24)
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


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_the_last_rows_are_those_of_a_small_tensor(name: str, x: torch.Tensor) -> None:
    """The upstream gradient is as large as the input, and is the input."""
    run, first = DIFFERENTIABLE[name], x[:2].clone()

    def gradient(part: torch.Tensor) -> torch.Tensor:
        leaf = part.detach().requires_grad_()
        out = run(leaf, first)
        return torch.autograd.grad(out, leaf, part.view(out.shape))[0]

    whole, small = gradient(x), gradient(torch.cat((x[:2], x[-5:])))
    torch.testing.assert_close(whole[-5:], small[-5:], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(whole[:2], small[:2], rtol=1e-2, atol=1e-2)


def test_group_norm_of_one_picture(x: torch.Tensor) -> None:
    """Groups of 67 million elements, of which the last ends beyond the 2**31st."""
    flat = x.view(32, -1)

    def normed(part: torch.Tensor) -> torch.Tensor:
        return group_norm(part[None, :, None], len(part))

    torch.testing.assert_close(normed(flat)[0, -1:, 0], normed(flat[-1:])[0, :, 0], rtol=1e-2, atol=1e-2)


def _heads(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """Rows as tokens, [1, heads, tokens, features]: each head is spread over the whole tensor."""
    return x.view(1, -1, HEADS, WIDTH)[:, :, :heads].transpose(1, 2)


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rotations(normed: bool, contiguous: bool, x: torch.Tensor) -> None:
    """Tokens beyond the 2**31st element, in the layout of a projection and head by head; with gradients."""
    need(40)
    angles = torch.arange(ROWS, device="cuda")[:, None] * torch.logspace(0, -4, WIDTH // 2, device="cuda")
    cos, sin = (f(angles).repeat(1, 2).to(x.dtype)[None] for f in (torch.cos, torch.sin))

    def turned(part: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        q, k = _heads(part), _heads(part, 4)
        if contiguous:
            q, k = q.contiguous(), k.contiguous()
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        weight = x[0, :WIDTH].clone()
        out = qk_norm_rope(q, k, weight, weight, cos, sin) if normed else rope(q, k, cos, sin)
        return [*out, *torch.autograd.grad(out, (q, k), (q.detach(), k.detach()))]

    small = turned(x[-5:], cos[:, -5:], sin[:, -5:])
    for whole, alone in zip(turned(x, cos, sin), small):
        torch.testing.assert_close(whole[:, :, -5:], alone, rtol=1e-2, atol=1e-2)


def test_attention(x: torch.Tensor) -> None:
    """The last tokens of half a million, which see few others; whatever has tokens is large."""
    need(60)

    def attended(part: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = (_heads(part).detach().requires_grad_() for _ in range(3))
        out = attention(q, k, v, is_causal=True, window=64)
        return [out, *torch.autograd.grad(out, (q, k, v), _heads(part))]

    for whole, alone in zip(attended(x), attended(x[-256:])):
        torch.testing.assert_close(whole[:, :, -5:], alone[:, :, -5:], rtol=2e-2, atol=2e-2)


def test_attention_of_many_sequences(x: torch.Tensor) -> None:
    """Short sequences, the last of which lie beyond the 2**31st element."""
    need(60)

    def attended(part: torch.Tensor) -> list[torch.Tensor]:
        leaves = [part.view(-1, 2, 16, WIDTH).detach().requires_grad_() for _ in range(3)]
        out = attention(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, part.view(out.shape))]

    for whole, alone in zip(attended(x), attended(x[-5:])):
        torch.testing.assert_close(whole[-5:], alone, rtol=2e-2, atol=2e-2)


def test_decode_attention(x: torch.Tensor) -> None:
    """The keys of the last head end beyond the 2**31st element."""
    keys = x.view(1, 8, -1, WIDTH)
    q = torch.randn(1, HEADS, 1, WIDTH, device="cuda", dtype=x.dtype)
    mine = decode_attention(q, keys, keys)[0, -4:, 0]
    last = keys[0, -1].float()
    weights = torch.softmax(q[0, -4:, 0].float() @ last.T * WIDTH**-0.5, dim=-1)
    torch.testing.assert_close(mine.float(), weights @ last, rtol=2e-2, atol=2e-3)


def _losses(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **how: int
) -> list[torch.Tensor]:
    hidden = hidden.detach().requires_grad_()
    each = linear_cross_entropy(hidden, weight, target, reduction="none", **how)
    return [each, torch.autograd.grad(each[-5:].sum(), hidden)[0]]


def test_linear_cross_entropy_of_many_rows(x: torch.Tensor) -> None:
    need(40)
    weight, target = x[:512] * 0.02, torch.arange(ROWS, device="cuda") % 512
    for whole, alone in zip(_losses(x, weight, target), _losses(x[-5:], weight, target[-5:])):
        torch.testing.assert_close(whole[-5:], alone, rtol=2e-2, atol=1e-3)


def test_linear_cross_entropy_of_all_logits_at_once(x: torch.Tensor) -> None:
    """Logits of more than 2**31 elements, where the caller asks for them."""
    need(40)
    hidden, weight = x.view(-1, 64)[:ROWS], x.view(-1, 64)[:COLUMNS] * 0.1
    target = torch.arange(ROWS, device="cuda") % COLUMNS
    whole = _losses(hidden, weight, target, rows_at_once=ROWS)
    for mine, alone in zip(whole, _losses(hidden[-5:], weight, target[-5:])):
        torch.testing.assert_close(mine[-5:], alone, rtol=2e-2, atol=1e-3)


def test_embedding_of_a_large_table(x: torch.Tensor) -> None:
    ids = torch.arange(ROWS - 5, ROWS, device="cuda")
    weight = x[0].clone()
    whole = embedding_sum_norm(ids, x, weight=weight)
    torch.testing.assert_close(whole, embedding_sum_norm(ids - ids[0], x[-5:], weight=weight))


def test_embedding_of_many_words(x: torch.Tensor) -> None:
    """The last word is one that occurs nowhere else, so that its gradient is that of the last row."""
    need(40)
    ids = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    ids[-1] = 1

    def embedded(ids: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        table = x[:2].clone().requires_grad_()
        out = embedding_sum_norm(ids, table, weight=x[2].clone())
        return [out[-1].detach(), torch.autograd.grad(out, table, upstream)[0][1]]

    for whole, alone in zip(embedded(ids, x), embedded(ids[-1:], x[-1:])):
        torch.testing.assert_close(whole, alone, rtol=1e-2, atol=1e-2)
