"""The kernels for sm_90 alone, on such a chip: sizes, strides, streams, graphs, repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kpt_plugin_triton import attention_hopper, staged_losses, staged_softmax
from kpt_plugin_triton.attention import attention
from kpt_plugin_triton.attention_forward import How, form_of
from kpt_plugin_triton.launch import INTERPRETED, architecture
from kpt_plugin_triton.linear_losses import linear_cross_entropy
from kpt_plugin_triton.loss_rows import Terms
from kpt_plugin_triton.losses import cross_entropy
from kpt_plugin_triton.references.losses import cross_entropy as reference
from kpt_plugin_triton.softmax import softmax

if INTERPRETED or not torch.cuda.is_available() or architecture(0) != "sm_90":
    pytest.skip("kernels for sm_90 need such a chip", allow_module_level=True)


def _logits(rows: int, columns: int, dtype: torch.dtype, spaced: int = 0) -> torch.Tensor:
    wide = 2 * torch.randn(rows, columns + spaced, device="cuda")
    return wide.to(dtype)[:, :columns]


def _targets(rows: int, columns: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    target = torch.randint(0, columns, (rows,), device="cuda", dtype=dtype)
    target[0], target[1], target[rows // 2], target[-1] = columns - 1, 0, -100, -100
    return target


def _compare(logits: torch.Tensor, target: torch.Tensor, upstream: float = 1.0, **options: Any) -> None:
    terms = Terms(-100, 0.0, options.get("z_loss", 0.0))
    assert staged_losses.takes(logits, True, terms), "left to the portable kernel"
    true = logits.double().requires_grad_()
    weight = options.get("weight")
    wide = {**options, "weight": None if weight is None else weight.double()}
    expected = reference(true, target.long(), **wide)
    (expected * upstream).backward()
    mine = logits.detach().requires_grad_()
    loss = cross_entropy(mine, target, **options)
    (loss * upstream).backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=5e-3, atol=1e-4)
    _close(mine.grad, true.grad, 3e-3)
    smallest = 6e-8 if logits.dtype == torch.float16 else 1e-9
    for row in (0, 1, len(target) // 2, len(target) - 1):  # the rounding of one number
        torch.testing.assert_close(mine.grad[row].double(), true.grad[row], rtol=1e-2, atol=smallest)


def _close(mine: torch.Tensor, true: torch.Tensor, tolerance: float) -> None:
    mine, true = mine.detach().double(), true.detach().double()
    distance = (mine - true).norm() / true.norm()
    assert float(distance) < tolerance, f"a relative error of {float(distance):.2g}"


@pytest.mark.parametrize("columns", [24592, 32000, 50304, 65536, 98304, 100352, 128256, 151936, 155648])
def test_cross_entropy(columns: int) -> None:
    _compare(_logits(271, columns, torch.bfloat16), _targets(271, columns))


@pytest.mark.parametrize(
    ("dtype", "spaced", "upstream", "options"),
    [
        (torch.float16, 0, 1.0, {"reduction": "sum"}),
        (torch.bfloat16, 64, 1.0, {"z_loss": 1e-3}),
        (torch.bfloat16, 0, -2.5, {"weight": True}),
        (torch.float16, 48, 0.5, {"weight": True, "z_loss": 1e-2, "reduction": "sum"}),
    ],
)
def test_cross_entropy_with_options(
    dtype: torch.dtype, spaced: int, upstream: float, options: dict[str, Any]
) -> None:
    columns = 50304
    if "weight" in options:
        options = {**options, "weight": torch.rand(columns, device="cuda") + 0.1}
    _compare(_logits(600, columns, dtype, spaced), _targets(600, columns, torch.int32), upstream, **options)


def test_cross_entropy_of_extreme_logits() -> None:
    """Labels far below the maximum, -inf, rows of one value: sums that are taken again."""
    logits, target = _logits(400, 128256, torch.bfloat16), _targets(400, 128256)
    logits *= 20
    logits[3, 100] = 3e4
    logits[4] = -3e4
    logits[5, : 128256 - 7] = float("-inf")
    target[5] = 128250
    logits[6, 1000:90000] = float("-inf")
    target[6] = 5
    logits[7, :] = 5.0
    _compare(logits, target)


def test_cross_entropy_of_labels_that_are_none() -> None:
    """NaN in the loss and in that row's gradient, zeros where a label is ignored."""
    logits, target = _logits(300, 32000, torch.bfloat16), _targets(300, 32000)
    logits[150, 5] = float("inf")  # ignored
    target[7] = 32000
    mine = logits.requires_grad_()
    loss = cross_entropy(mine, target, reduction="sum")
    loss.backward()
    assert loss.isnan() and mine.grad[7].isnan().all() and not mine.grad[8].isnan().any()
    assert (mine.grad[150] == 0).all() and (mine.grad[299] == 0).all()


def test_linear_cross_entropy_in_place() -> None:
    hidden = torch.randn(1500, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(128256, 256, device="cuda", dtype=torch.bfloat16) / 16).requires_grad_()
    target = _targets(1500, 128256)
    linear_cross_entropy(hidden, weight, target, rows_at_once=700).backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    torch.nn.functional.cross_entropy(hidden.float() @ weight.float().T, target).backward()
    _close(got[0], hidden.grad, 1e-2)
    _close(got[1], weight.grad, 1e-2)


def _compare_softmax(x: torch.Tensor) -> None:
    """Values and gradients; by the kernels for sm_90, forward in any case."""
    stages = staged_softmax.forward_stages(x.shape[1])
    assert stages is not None
    assert staged_softmax.forward(x, torch.empty(x.shape, dtype=x.dtype, device="cuda"), len(x), x.stride(0))
    mine, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, true = softmax(mine), torch.softmax(wide, -1)
    dy = torch.randn_like(y)
    covered = staged_softmax.backward_stages(x.shape[1]) is not None
    assert staged_softmax.backward(y.detach(), dy, dy.clone(), len(x), *[x.shape[1]] * 2) is covered
    y.backward(dy)
    true.backward(dy.double())
    eager = torch.softmax(x, -1)
    for row in (
        *range(14),
        len(x) // 2,
        len(x) - 1,
    ):  # of one row: a wrong one does not hide among the others
        bound = 1.3 * (eager[row].double() - true[row]).norm() + 1e-9
        assert (y[row].double() - true[row]).norm() <= bound
    assert not y.isnan().any()
    _close(y, true, 3e-3)
    _close(mine.grad, wide.grad, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "columns", [16400, 24576, 32768, 40976, 49152, 50304, 65536, 73728, 81920, 98304, 106496]
)
def test_softmax(columns: int, dtype: torch.dtype) -> None:
    _compare_softmax(_logits(277, columns, dtype))


@pytest.mark.parametrize("columns", [32768, 65536])
def test_softmax_of_spaced_rows_and_extreme_values(columns: int) -> None:
    """Rows whose few columns that are read ahead say little of the maximum, or are all -inf."""
    x = _logits(530, columns, torch.bfloat16, 48)
    assert not x.is_contiguous()
    x *= 20
    x[3, 77] = 3e4
    x[4] = -3e4
    x[5, : columns - 5] = float("-inf")
    x[6, 40:] = float("-inf")
    x[7, :: columns // 32] = float("-inf")
    x[8] = 5.0
    x[9] = torch.finfo(x.dtype).min
    x[10] = -1e10
    x[11] = 3e38
    x[12, columns - 9] = 1e10
    x[13] = torch.finfo(x.dtype).min
    x[13, 1:40] = 1.0
    x[529] = torch.arange(columns, device="cuda").to(x.dtype) / 256
    _compare_softmax(x)


def test_softmax_of_rows_that_have_no_answer() -> None:
    """NaN where torch gives NaN, in that row alone."""
    x = _logits(300, 65536, torch.bfloat16)
    x[7] = float("-inf")
    x[8, 60000] = float("inf")
    x[9, 5] = float("nan")
    nothing = softmax(x).isnan().all(dim=1)
    assert nothing.nonzero().flatten().tolist() == [7, 8, 9]
    assert not softmax(x)[10].isnan().any()


def _qkv(
    batch: int, heads: int, key_heads: int, queries: int, keys: int, head: int, inside: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    def drawn(many: int, length: int) -> torch.Tensor:
        shape = (batch, length, many, head) if inside else (batch, many, length, head)
        found = torch.randn(shape, device="cuda", dtype=dtype)
        return found.transpose(1, 2) if inside else found

    return drawn(heads, queries), drawn(key_heads, keys), drawn(key_heads, keys)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """In fp32; causal from the first query and key on."""
    each = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(each, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[2:], dtype=torch.bool, device="cuda").triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(each, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2, 2, 128, 128, 128),
        (2, 3, 3, 1000, 1000, 128),
        (2, 4, 2, 513, 1300, 128),
        (1, 4, 1, 1300, 513, 64),
        (3, 40, 8, 640, 640, 64),
        (1, 64, 8, 1024, 1024, 128),
        (1, 6, 6, 129, 17, 128),
    ],
)
def test_attention(sizes: tuple[int, ...], causal: bool) -> None:
    for inside in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v = (x.requires_grad_() for x in _qkv(*sizes, inside=inside, dtype=dtype))
            assert attention_hopper.takes(q, k, v, None, form_of(q, k, v), How(causal, None, 1.0, None))
            wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
            out, expected = attention(q, k, v, is_causal=causal), _plain(*wide, causal)
            upstream = torch.randn_like(expected)
            _close(out, expected, 6e-3)
            got = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
            for mine, true in zip(got, torch.autograd.grad(expected, wide, upstream), strict=True):
                _close(mine, true, 1.5e-2)


def _calls() -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    q, k, v = _qkv(2, 16, 4, 1111, 1111, 128)
    short = _qkv(2, 16, 16, 700, 700, 64)
    logits, target = _logits(600, 128256, torch.bfloat16), _targets(600, 128256)
    rows, turned = (_logits(1300, 65536, torch.bfloat16) for _ in range(2))
    turned.requires_grad_()

    def losses() -> tuple[torch.Tensor, ...]:
        mine = logits.detach().requires_grad_()
        loss = cross_entropy(mine, target)
        return loss.detach(), *torch.autograd.grad(loss, mine)

    return {
        "attention 128": lambda: (attention(q, k, v, is_causal=True),),
        "attention 64": lambda: (attention(*short),),
        "cross_entropy": losses,
        "softmax": lambda: (softmax(rows), torch.autograd.grad(softmax(turned), turned, rows)[0]),
    }


@pytest.mark.parametrize("name", ["attention 128", "attention 64", "cross_entropy", "softmax"])
def test_every_launch_gives_the_same_bits(name: str) -> None:
    """Beside a second stream that keeps memory busy, and another one that runs the same kernel."""
    call = _calls()[name]
    first = call()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    source, sink = (torch.empty(2**28, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        with torch.cuda.stream(busy):
            sink.copy_(source)
        with torch.cuda.stream(other):
            results.append(call())
        results.append(call())
        if len(results) >= 10:
            torch.cuda.synchronize()
            for result in results:
                assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
            results = []


@pytest.mark.parametrize("name", ["attention 128", "cross_entropy", "softmax"])
def test_graphs(name: str) -> None:
    call = _calls()[name]
    first = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
