"""Every kernel once or twice on small, odd sizes, forward and backward: what the compute sanitizer watches.

    compute-sanitizer --tool memcheck python plugins/triton/tests/small_cases.py [norms losses attention ...]

Values are the business of tests/values; here a call has to end, with finite numbers in what it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt_plugin_triton import (
    activations,
    attention,
    block_sparse,
    decode,
    embedding,
    gated_mlp,
    glu,
    group_norm,
    linear_losses,
    losses,
    norms,
    norms_fp8,
    qk_norm_rope,
    quantise,
    rope,
    skinny,
    softmax,
    varlen,
)
from kpt_plugin_triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
#: The interpreter's bfloat16 is wrong.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
Case = tuple[str, Callable[[], Any]]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()


def labels(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, below, shape, device=DEVICE)


def norm_cases() -> Iterator[Case]:
    for columns in (80, 1023, 8200):
        x, weight, bias = randn(5, columns), randn(columns), randn(columns)
        yield f"rms_norm {columns}", lambda x=x, w=weight: norms.rms_norm(x, w)
        yield f"add_rms_norm {columns}", lambda x=x, w=weight: norms.add_rms_norm(x, x, w)
        yield f"layer_norm {columns}", lambda x=x, w=weight, b=bias: norms.layer_norm(x, w, b)
        yield f"add_layer_norm {columns}", lambda x=x, w=weight, b=bias: norms.add_layer_norm(x, x, w, b)


def loss_cases() -> Iterator[Case]:
    for classes in (37, 1000, 32000, 50257):
        logits, target = randn(5, classes), labels(classes, 5)
        target[3] = -100
        yield f"cross_entropy {classes}", lambda x=logits, t=target: losses.cross_entropy(x, t)
        yield (
            f"cross_entropy {classes}, smoothed rows",
            lambda x=logits, t=target: losses.cross_entropy(x, t, label_smoothing=0.1, reduction="none"),
        )
        yield f"softmax {classes}", lambda x=logits: softmax.softmax(x)
    hidden, weight, target = randn(37, 48), randn(1003, 48), labels(1003, 37)
    for options in ({}, {"rows_at_once": 16, "softcap": 20.0}, {"reduction": "none"}):
        yield (
            f"linear_cross_entropy {options}",
            lambda o=options: linear_losses.linear_cross_entropy(hidden, weight, target, **o),
        )


def long_row_cases() -> Iterator[Case]:
    """Rows that sm_90 keeps on a multiprocessor, enough of them for each to have two; elsewhere a few."""
    rows = 4 if INTERPRETED else 300
    for columns in (16400, 65536):
        x = randn(rows, columns)
        yield f"softmax {rows}x{columns}", lambda x=x: softmax.softmax(x)
    logits, target = randn(rows, 24592), labels(24592, rows)
    yield f"cross_entropy {rows}x24592", lambda: losses.cross_entropy(logits, target)


def rope_cases() -> Iterator[Case]:
    for width in (64, 128):
        q, k = (randn(2, 7, heads, width).transpose(1, 2) for heads in (4, 2))
        tables = [x.detach() for x in (randn(1, 7, width), randn(1, 7, width))]
        weights = randn(width), randn(width)
        yield f"rope {width}", lambda q=q, k=k, t=tables: rope.rope(q, k, *t)
        yield (
            f"qk_norm_rope {width}",
            lambda q=q, k=k, t=tables, w=weights: qk_norm_rope.qk_norm_rope(q, k, *w, *t),
        )


def activation_cases() -> Iterator[Case]:
    gate, up, bias = randn(5, 333), randn(5, 333), randn(333)
    yield "glu", lambda: glu.glu(gate, up)
    yield "gated_mlp", lambda: gated_mlp.gated_mlp(randn(5, 40), randn(72, 40), randn(72, 40), randn(40, 72))
    yield "bias_activation", lambda: activations.bias_activation(gate, bias)
    weight = randn(24)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = randn(2, 24, 9, 7).detach().contiguous(memory_format=layout).requires_grad_()
        yield (
            f"group_norm {layout}",
            lambda x=x: group_norm.group_norm(x, 4, weight, weight, activation="silu"),
        )
    large = randn(1, 8, 72, 72).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    yield "group_norm stripes", lambda: group_norm.group_norm(large, 2, randn(8), randn(8), activation="silu")
    ids, tables = labels(11, 2, 6), [randn(11, 80), randn(8, 80), randn(11, 80)]
    places = torch.arange(6, device=DEVICE)[None]
    yield (
        "embedding_sum_norm",
        lambda: embedding.embedding_sum_norm(
            ids, tables[0], places, tables[1], ids, tables[2], randn(80), randn(80)
        ),
    )


def quantise_cases() -> Iterator[Case]:
    for columns in (200, 4096):
        x, other, weight = (randn(*shape).detach() for shape in ((5, columns), (5, columns), (columns,)))
        for mode in ("row", "block", "tensor"):
            yield f"quantise {columns} {mode}", lambda x=x, m=mode: quantise.quantise_fp8(x, m)
            yield f"silu_mul {columns} {mode}", lambda x=x, y=other, m=mode: quantise.silu_mul_fp8(x, y, m)
            yield (
                f"rms_norm_fp8 {columns} {mode}",
                lambda x=x, y=other, w=weight, m=mode: norms_fp8.rms_norm_fp8(x, w, residual=y, mode=m),
            )


def skinny_cases() -> Iterator[Case]:
    half = torch.float16 if INTERPRETED else DTYPE  # nothing wider is taken
    wide, deep = (67, 384) if INTERPRETED else (333, 1024)
    weight = randn(wide, deep).detach().to(half)
    eight, codes = skinny.quantise_int8(weight), skinny.quantise_fp8(weight)
    for rows in (1, 5, 16):
        x = randn(rows, deep).detach().to(half)
        yield f"linear {rows}", lambda x=x: skinny.linear(x, weight)
        yield f"linear_int8 {rows}", lambda x=x: skinny.linear_int8(x, *eight)
        yield f"linear_fp8 {rows}", lambda x=x: skinny.linear_fp8(x, *codes)


def attention_cases() -> Iterator[Case]:
    for head in (64, 128):
        q, k, v = randn(1, 4, 200, head), randn(1, 2, 200, head), randn(1, 2, 200, head)
        mask = torch.rand(1, 1, 200, 200, device=DEVICE) < 0.7
        blocks = torch.rand(1, 4, 4, 4, device=DEVICE) < 0.7
        forms: dict[str, dict[str, Any]] = {
            "causal": {"is_causal": True},
            "plain": {},
            "window": {"is_causal": True, "window": 70},
            "soft cap": {"is_causal": True, "softcap": 20.0},
            "masked": {"mask": mask},
        }
        for name, how in forms.items():
            yield (
                f"attention {head} {name}",
                lambda q=q, k=k, v=v, h=how: attention.attention(q, k, v, **h),
            )
        yield (
            f"attention {head} blocks",
            lambda q=q, k=k, v=v, b=blocks: block_sparse.attention_block_sparse(q, k, v, b),
        )
        ends = torch.tensor([0, 0, 77, 200, 200], device=DEVICE, dtype=torch.int32)
        packed = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in (q, k, v)]
        yield (
            f"attention {head} packed, with empty sequences",
            lambda p=packed, e=ends: varlen.attention_varlen(*p, e, e, 123, 123, is_causal=True),
        )
        one, keys, values = (
            randn(1, heads, rows, head).detach() for heads, rows in ((4, 1), (2, 700), (2, 700))
        )
        lengths = torch.tensor([650], device=DEVICE)
        yield (
            f"decode {head}",
            lambda q=one, k=keys, v=values, n=lengths: decode.decode_attention(q, k, v, n),
        )


FAMILIES = {
    "norms": norm_cases,
    "losses": loss_cases,
    "long rows": long_row_cases,
    "rope": rope_cases,
    "activations": activation_cases,
    "quantise": quantise_cases,
    "skinny": skinny_cases,
    "attention": attention_cases,
}


def run(families: list[str]) -> int:
    """Run the cases of these families (all, if there are none); returns how many."""
    torch.manual_seed(0)
    done = 0
    for family in families or list(FAMILIES):
        for name, call in FAMILIES[family]():
            made = call()
            outputs = [y for y in (made if isinstance(made, tuple) else (made,)) if y is not None]
            differentiable = [y for y in outputs if y.requires_grad]
            if differentiable:
                torch.autograd.backward(differentiable, [torch.ones_like(y) for y in differentiable])
            for y in outputs:
                if not y.float().isfinite().all():
                    raise AssertionError(f"{name}: numbers that are not finite")
            done += 1
            print(f"{name}: ran", flush=True)
    return done


if __name__ == "__main__":
    print(f"{run(sys.argv[1:])} cases ended")
