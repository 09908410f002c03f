"""Attention: causal, plain, a sliding window, kept blocks; a cache of keys read by one query.

Operations: two products of the pairs of queries and keys that are not hidden, forward 4 D each, with backward
3.5 times that. Decoding counts the bytes of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from gpu.case import Case, Prepare
from gpu.inputs import device, held, random

#: Batch, heads, key heads, sequence, features, with the goals of forward and both in TFLOP/s, and the rank.
CAUSAL: tuple[tuple[int, int, int, int, int, float | None, float | None, int], ...] = (
    (2, 32, 32, 8192, 128, 550, 400, 0),
    (4, 32, 32, 2048, 128, None, None, 3),
    (4, 32, 32, 4096, 64, None, None, 4),
    (2, 32, 8, 8192, 128, None, None, 4),
    (1, 32, 32, 32768, 128, None, None, 8),
)
WINDOW, BLOCK = 1024, 128


def cases() -> Iterator[Case]:
    for batch, heads, key_heads, length, head, forward, both, rank in CAUSAL:
        shape = (batch, heads, key_heads, length, head)
        yield _dense("attention causal", shape, True, None, False, forward, rank)
        yield _dense("attention causal", shape, True, None, True, both, rank)
    shape = (2, 32, 32, 8192, 128)
    yield _dense("attention plain", shape, False, None, False, None, 5)
    for backward in (False, True):
        yield _dense(f"attention window {WINDOW}", shape, True, WINDOW, backward, None, 1)
        yield _sparse(shape, backward, 1)
    yield _decode(1, 32, 8, 32768, 128, 3200, 1)
    yield _decode(1, 32, 32, 32768, 128, 3200, 4)
    yield _decode(16, 32, 8, 8192, 128, 3200, 4)


def _inputs(shape: tuple[int, ...], backward: bool) -> Callable[[], tuple[Any, ...]]:
    batch, heads, key_heads, length, head = shape

    def make() -> tuple[Any, ...]:
        sizes = ((batch, heads), (batch, key_heads), (batch, key_heads), (batch, heads))
        # the same shape would give the same numbers
        drawn = [random(4, *size, length, head)[n] for n, size in enumerate(sizes)]
        return *(x.requires_grad_(backward) for x in drawn[:3]), drawn[3]

    return held(make)


def _timed(inputs: Callable[[], tuple[Any, ...]], function: Callable[..., Any]) -> Callable[[], Any]:
    q, k, v, dout = inputs()
    if not q.requires_grad:
        return lambda: function(q, k, v)
    return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), dout)


def _sdpa(backend: str, causal: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def _flex(sizes: tuple[int, int], visible: Any) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled; ``visible`` is its mask function, or None."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None if visible is None else create_block_mask(visible, None, None, *sizes, device=device())
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _true(
    inputs: Callable[[], tuple[Any, ...]],
    visible: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> Any:
    """Outputs, or gradients, in fp32, one head at a time: the scores of all would be gigabytes."""
    q, k, v, dout = inputs()
    backward, group = q.requires_grad, q.shape[1] // k.shape[1]
    hidden = None
    if visible is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        columns = torch.arange(k.shape[2], device=q.device)[None, :]
        hidden = ~visible(rows, columns)
    out = torch.empty(*q.shape[:3], v.shape[-1], device=q.device)
    grads = [torch.zeros(x.shape, device=q.device) for x in (q, k, v)] if backward else []
    for entry in range(q.shape[0]):
        for head in range(q.shape[1]):
            places = ((entry, head), (entry, head // group), (entry, head // group))
            one = [x.detach()[at].float().requires_grad_(backward) for x, at in zip((q, k, v), places)]
            scores = one[0] @ one[1].t() * q.shape[-1] ** -0.5
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            result = scores.softmax(-1) @ one[2]
            del scores
            if backward:
                found = torch.autograd.grad(result, one, dout[entry, head].float())
                for whole, at, part in zip(grads, places, found):
                    whole[at] += part
            else:
                out[entry, head] = result
    return tuple(grads) if backward else out


def _size(shape: tuple[int, ...]) -> str:
    batch, heads, key_heads, length, head = shape
    of_keys = f"({key_heads})" if key_heads != heads else ""
    return f"{batch}x{heads}{of_keys}x{length}x{head}"


def _case(
    op: str,
    shape: tuple[int, ...],
    pairs: float,
    backward: bool,
    contenders: dict[str, Prepare],
    reference: Callable[[], Any],
    goal: float | None,
    ahead: tuple[str, float] | None,
    rank: int,
) -> Case:
    batch, heads, _, _, head = shape
    return Case(
        op=op + (" fwd+bwd" if backward else " fwd"),
        size=_size(shape),
        unit="TFLOP/s",
        amount=4 * batch * heads * pairs * head * (3.5 if backward else 1),
        contenders=contenders,
        reference=reference,
        goal=goal,
        ahead=ahead,
        rank=rank,
    )


def _dense(
    op: str,
    shape: tuple[int, ...],
    causal: bool,
    window: int | None,
    backward: bool,
    goal: float | None,
    rank: int,
) -> Case:
    length = shape[3]
    inputs = _inputs(shape, backward)

    def visible(rows: Any, columns: Any) -> Any:
        seen = rows >= columns
        return seen if window is None else seen & (rows - columns < window)

    def flex() -> Callable[[], Any]:
        rule = (lambda b, h, rows, columns: visible(rows, columns)) if causal else None
        return _timed(inputs, _flex((length, length), rule))

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.attention import attention

        return _timed(inputs, lambda q, k, v: attention(q, k, v, is_causal=causal, window=window))

    contenders: dict[str, Prepare] = {}
    if window is None:
        contenders["flash"] = lambda: _timed(inputs, _sdpa("FLASH_ATTENTION", causal))
        contenders["cudnn"] = lambda: _timed(inputs, _sdpa("CUDNN_ATTENTION", causal))
    contenders |= {"flex": flex, "kpt": kpt}
    pairs = length * (length + 1) / 2 if causal else length**2
    if window is not None:
        pairs -= (length - window) * (length - window + 1) / 2
    reference = lambda: _true(inputs, visible if causal else None)  # noqa: E731
    ahead = None if window is None else ("flex", 1.0)
    return _case(op, shape, pairs, backward, contenders, reference, goal, ahead, rank)


def _sparse(shape: tuple[int, ...], backward: bool, rank: int) -> Case:
    """A quarter of the blocks, drawn at random, and the diagonal."""
    length = shape[3]
    blocks = length // BLOCK
    drawn = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.25
    kept = drawn | torch.eye(blocks, dtype=torch.bool)
    inputs = _inputs(shape, backward)

    def flex() -> Callable[[], Any]:
        table = kept.to(device())
        rule = lambda b, h, rows, columns: table[rows // BLOCK, columns // BLOCK]  # noqa: E731
        return _timed(inputs, _flex((length, length), rule))

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.block_sparse import attention_block_sparse

        table = kept.to(device())[None, None]
        return _timed(inputs, lambda q, k, v: attention_block_sparse(q, k, v, table))

    def reference() -> Any:
        table = kept.to(device())
        return _true(inputs, lambda rows, columns: table[rows // BLOCK, columns // BLOCK])

    pairs = int(kept.sum()) * BLOCK**2
    name = f"attention blocks of {BLOCK}"
    return _case(
        name, shape, pairs, backward, {"flex": flex, "kpt": kpt}, reference, None, ("flex", 1.0), rank
    )


def _decode(
    batch: int, heads: int, key_heads: int, keys: int, head: int, goal: float | None, rank: int
) -> Case:
    inputs = held(
        lambda: (
            random(batch, heads, 1, head),
            *(x for x in random(2, batch, key_heads, keys, head)),
            None,
        )
    )

    def kpt() -> Callable[[], Any]:
        from kpt_plugin_triton.decode import decode_attention

        return _timed(inputs, decode_attention)

    return Case(
        op="decode_attention",
        size=f"{batch}x{heads}({key_heads})x{keys}x{head}",
        unit="GB/s",
        amount=2 * batch * key_heads * keys * head * 2,
        contenders={
            "flash": lambda: _timed(inputs, _sdpa("FLASH_ATTENTION", False)),
            "cudnn": lambda: _timed(inputs, _sdpa("CUDNN_ATTENTION", False)),
            "flex": lambda: _timed(inputs, _flex((1, keys), None)),
            "kpt": kpt,
        },
        reference=lambda: _true(inputs, None),
        goal=goal,
        graph=True,
        rank=rank,
        note="inside a CUDA graph; keys and values exceed the L2 cache",
    )
