"""cross_entropy against fp64: every option, rows in registers and rows that are read twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import loss_rows
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED, power_of_two
from kpt_plugin_triton.losses import cross_entropy
from kpt_plugin_triton.references.losses import cross_entropy as reference

DEVICE = TritonSuite.device
KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}


class TestCrossEntropy(TritonSuite):
    kernel = KERNELS["cross_entropy"]


class TestCrossEntropyOfLongRows(TestCrossEntropy):
    """The same through the kernel for rows that do not fit in registers."""

    most_rows = 17 if INTERPRETED else 70

    @pytest.fixture(autouse=True)
    def long_rows(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        yield from _reading_twice(monkeypatch)


def _reading_twice(monkeypatch: pytest.MonkeyPatch, block: int = 8) -> Iterator[None]:
    options = {"ROWS": 0, "BLOCK": block, "PROGRAMS": 1, "num_warps": 1}
    for table in ("options_of", "loss_options"):
        monkeypatch.setattr(loss_rows, table, lambda *_: options)
    yield


@pytest.fixture(params=["short", "long"])
def length(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "long":
        yield from (request.param for _ in _reading_twice(monkeypatch, 16))
    else:
        yield request.param


def _draw(
    rows: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = (2 * torch.randn(rows, classes, device=DEVICE)).to(dtype)
    target = torch.randint(0, classes, (rows,), device=DEVICE)
    target[rows // 2] = -100
    return logits, target, torch.rand(classes, device=DEVICE, dtype=dtype) + 0.1


def _compare(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
    """Loss, and the gradients of an upstream gradient of 1 and of another one, against fp64."""
    half = logits.dtype == torch.float16
    tolerance = {"rtol": 4e-3, "atol": 1e-4} if half else {"rtol": 2e-5, "atol": 2e-6}
    true = logits.double().requires_grad_()
    weight = options.get("weight")
    wide = {**options, "weight": None if weight is None else weight.double()}
    expected = reference(true, target, **wide)
    for upstream in (torch.ones_like(expected), torch.randn_like(expected)):
        mine = logits.detach().clone().requires_grad_()
        loss = cross_entropy(mine, target, **options)
        torch.testing.assert_close(loss.double(), expected.detach(), **tolerance)
        (grad,) = torch.autograd.grad(loss, mine, upstream.to(loss.dtype))
        (right,) = torch.autograd.grad(expected, true, upstream.to(loss.dtype).double(), retain_graph=True)
        torch.testing.assert_close(grad.double(), right, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(logits, target, **options), loss)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("weighed", [False, True])
def test_every_option(length: str, reduction: str, smoothing: float, z_loss: float, weighed: bool) -> None:
    torch.manual_seed(0)
    logits, target, weight = _draw(11, 53)
    _compare(
        logits,
        target,
        weight=weight if weighed else None,
        reduction=reduction,
        label_smoothing=smoothing,
        z_loss=z_loss,
    )


def test_half_precision(length: str) -> None:
    torch.manual_seed(0)
    logits, target, weight = _draw(9, 64, torch.float16)
    for reduction in ("mean", "none"):
        _compare(logits, target, weight=weight, reduction=reduction, label_smoothing=0.1)


def test_vocabulary_that_is_really_long() -> None:
    torch.manual_seed(0)
    logits, target, _ = _draw(3, 50257)
    logits[0, 50256] = 40.0
    target[0] = 50256
    _compare(logits, target, z_loss=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(0, 3), st.sampled_from([-100, 0]), st.integers(0, 99)
)
def test_any_size_spacing_and_ignored_class(
    rows: int, classes: int, gap: int, ignored: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits, target, _ = _draw(rows, classes + gap)
    target = target.clamp(max=classes - 1)
    target[target == -100] = ignored
    _compare(logits[:, :classes], target, ignore_index=ignored, reduction="sum")


def test_infinite_logits(length: str) -> None:
    """Classes that are ruled out have no gradient; a row without any class is NaN, as in PyTorch."""
    torch.manual_seed(0)
    logits, target, _ = _draw(6, 40)
    logits[:, 30:] = float("-inf")
    target = target.clamp(max=29)
    _compare(logits, target)
    logits[1] = float("-inf")
    assert cross_entropy(logits, target).isnan()
    assert cross_entropy(logits, target, reduction="none").isnan().nonzero().tolist() == [[1]]


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}, {"reduction": "sum"}, {"reduction": "none"}])
def test_a_row_that_does_not_count_may_rule_out_any_class(length: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, target, _ = _draw(6, 40)
    logits[:, 0] = float("-inf")
    _compare(logits, target.where(target != 0, 1), **options)


@pytest.mark.parametrize("first", [-300.0, -100.0, -40.0, float("-inf"), 300.0])
def test_first_classes_far_from_the_others(length: str, first: float) -> None:
    """Sums of exponentials over the first classes' maximum would overflow, lose digits, or have none."""
    torch.manual_seed(0)
    logits, target, _ = _draw(6, 70)
    logits[:, :4] += first
    logits[3, 4:12] = first
    logits[4, 60:] += 30.0
    _compare(logits, target.clamp(12, 59))


def test_nothing_counts_and_nothing_there() -> None:
    logits = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    ignored = torch.full((3,), -100, device=DEVICE)
    assert cross_entropy(logits, ignored).isnan()
    (grad,) = torch.autograd.grad(cross_entropy(logits, ignored), logits)
    assert not grad.any()
    assert cross_entropy(logits, ignored, reduction="sum") == 0
    none = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = cross_entropy(none, ignored[:0], reduction=reduction)
        like = torch.nn.functional.cross_entropy(none, ignored[:0], reduction=reduction)
        torch.testing.assert_close(loss, like, equal_nan=True)
        assert torch.autograd.grad(loss.sum(), none)[0].shape == (0, 5)


def test_label_outside_of_the_classes_is_nan_and_reads_nothing(length: str) -> None:
    logits, target, weight = _draw(4, 20)
    target[:] = 3
    target[2] = 20
    for given_weight in (None, weight):
        loss = cross_entropy(logits, target, given_weight, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False]


def test_labels_of_any_spacing_and_of_32_bits() -> None:
    torch.manual_seed(0)
    logits, _, _ = _draw(8, 12)
    target = torch.randint(0, 12, (8, 2), device=DEVICE)[:, 0]
    _compare(logits, target)
    torch.testing.assert_close(cross_entropy(logits, target.int()), cross_entropy(logits, target))


def test_logits_are_left_alone_and_gradients_belong_to_the_caller(length: str) -> None:
    """A second backward pass is not affected by what was done to the first one's result."""
    logits, target, _ = _draw(5, 33)
    copy = logits.clone()
    logits.requires_grad_()
    loss = cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(kept, second)
    (doubled,) = torch.autograd.grad(2 * loss, logits)
    torch.testing.assert_close(doubled, 2 * kept)
    assert torch.equal(logits, copy)


@pytest.mark.parametrize(
    ("columns", "gap", "start"), [(24, 8, 0), (24, 4, 8), (40, 0, 0), (20, 12, 1), (21, 3, 2)]
)
def test_rows_spaced_by_any_unit(length: str, columns: int, gap: int, start: int) -> None:
    """Rows, and their distance, of a multiple of 8, 4, 2 or 1 elements, from an address of any alignment."""
    torch.manual_seed(0)
    logits, target, _ = _draw(9, columns + gap + start, torch.float16)
    _compare(logits[:, start : start + columns], target % columns)


def test_many_rows_of_few_classes() -> None:
    torch.manual_seed(0)
    logits, target, _ = _draw(3000, 3)
    _compare(logits, target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(length: str, reduction: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 19, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = torch.tensor([0, 18, -100, 7], device=DEVICE)
    options: dict[str, Any] = {"label_smoothing": 0.125, "z_loss": 0.5, "reduction": reduction}
    assert gradcheck(lambda x: cross_entropy(x, target, **options), (logits,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_with_gradients(reduction: str) -> None:
    logits, target, weight = _draw(7, 21)
    logits.requires_grad_()

    def loss(x: torch.Tensor, run: Any) -> torch.Tensor:
        return run(3 * x, target, weight, -100, 0.1, reduction).square().sum()

    compiled = torch.compile(lambda x: loss(x, cross_entropy), fullgraph=True, backend="aot_eager")
    (mine,) = torch.autograd.grad(compiled(logits), logits)
    (true,) = torch.autograd.grad(loss(logits, reference), logits)
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


LOGITS, TARGET = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGITS.long(), TARGET), {}, "logits is int64"),
        ((LOGITS[0], TARGET), {}, r"logits is of shape \(6,\); supported: \(rows, classes\)"),
        ((LOGITS[:, :0], TARGET), {}, "at least one class"),
        ((LOGITS, TARGET.float()), {}, "target is float32; supported: int64, int32"),
        ((LOGITS, TARGET[:3]), {}, r"target is of shape \(3,\); supported: shape \(4,\)"),
        ((LOGITS, TARGET), {"weight": torch.ones(4)}, r"weight is of shape \(4,\)"),
        ((LOGITS, TARGET), {"weight": torch.ones(6, requires_grad=True)}, "weight requires a gradient"),
        ((LOGITS, TARGET), {"reduction": "median"}, "reduction is 'median'; supported: mean, sum, none"),
        ((LOGITS, TARGET), {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ((LOGITS, TARGET), {"ignore_index": None}, "ignore_index is None"),
    ],
)
def test_refuses_by_name(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        cross_entropy(
            *(value.to(DEVICE) for value in arguments),
            **{k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()},
        )


def test_options_for_every_vocabulary() -> None:
    """Rows in registers while they fit; whole vectors, and a block no longer than the row, beyond."""
    for classes in (1, 1000, 8192, 16385, 32000, 50257, 128256, 262144):
        for itemsize in (2, 4, 8):
            chosen = loss_rows._rule(itemsize, classes)
            assert chosen["num_warps"] <= 16  # 1024 threads where a wavefront is 64 wide
            assert (chosen["ROWS"] > 0) == (power_of_two(classes) * itemsize <= 32768)
            assert chosen["ROWS"] or chosen["BLOCK"] <= classes
