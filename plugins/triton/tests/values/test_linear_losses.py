"""linear_cross_entropy against fp64: options, chunks, what is wanted, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import linear_loss_chunks
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.linear_loss_chunks import plan
from kpt_plugin_triton.linear_losses import linear_cross_entropy
from kpt_plugin_triton.references.losses import linear_cross_entropy as reference

DEVICE = TritonSuite.device
KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}


class TestLinearCrossEntropy(TritonSuite):
    kernel = KERNELS["linear_cross_entropy"]

    def arguments(self) -> Mapping[str, Any]:
        generator = torch.Generator(self.device).manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        # classes enough for errors of the bias's gradient not to be a matter of luck
        target = torch.randint(0, 203, (26,), generator=generator, device=self.device)
        return {"hidden": randn(26, 16), "weight": randn(203, 16), "target": target, "bias": randn(203)}

    def reference(self) -> Any:
        return reference


def _draw(rows: int, hidden: int, classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    target = torch.randint(0, classes, (rows,), device=DEVICE)
    target[rows // 2] = -100
    return {
        "hidden": torch.randn(rows, hidden, device=DEVICE).to(dtype),
        "weight": torch.randn(classes, hidden, device=DEVICE).to(dtype),
        "target": target,
        "bias": torch.randn(classes, device=DEVICE).to(dtype),
    }


def _gradients(run: Any, arguments: dict[str, Any], upstream: torch.Tensor | None, **options: Any) -> Any:
    inputs = {
        name: value.detach().requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    loss = run(**inputs, **options)
    wanted = [v for v in inputs.values() if v is not None and v.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, wanted, upstream)


def _compare(arguments: dict[str, Any], upstream: Any = None, tolerance: Any = None, **options: Any) -> None:
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in arguments.items()}
    given = None if upstream is None else upstream.double()
    at_once = options.pop("rows_at_once", None)
    loss, grads = _gradients(linear_cross_entropy, arguments, upstream, rows_at_once=at_once, **options)
    expected, right = _gradients(reference, wide, given, **options)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for mine, true in zip(grads, right):
        torch.testing.assert_close(mine.double(), true, **tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_has_the_dtype_of_a_linear_layer_and_its_loss_and_is_rounded_once(reduction: str) -> None:
    """Of rounded logits, beside which the error of the loss is that of its own dtype."""
    torch.manual_seed(0)
    given = _draw(24, 16, 40, torch.float16)
    logits = torch.nn.functional.linear(given["hidden"], given["weight"], given["bias"])
    eager = torch.nn.functional.cross_entropy(logits, given["target"], reduction=reduction)
    mine = linear_cross_entropy(**given, reduction=reduction)
    assert mine.dtype is eager.dtype is torch.float16
    right = torch.nn.functional.cross_entropy(logits.double(), given["target"], reduction=reduction)
    torch.testing.assert_close(mine.double(), right, rtol=2**-11 + 1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 1e-2, "label_smoothing": 0.1}])
@pytest.mark.parametrize("rows_at_once", [None, 1, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_every_option(reduction: str, options: dict[str, float], rows_at_once: Any, biased: bool) -> None:
    torch.manual_seed(0)
    arguments = _draw(13, 8, 19)
    if not biased:
        arguments["bias"] = None
    upstream = torch.randn(13 if reduction == "none" else (), device=DEVICE)
    _compare(arguments, upstream, reduction=reduction, rows_at_once=rows_at_once, **options)


def test_sum_in_fp32_where_chunks_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss_chunks, "plan", lambda *_: (3, True))
    monkeypatch.setattr(linear_loss_chunks, "_SLICE", 7)
    torch.manual_seed(0)
    _compare(_draw(10, 8, 19))


def test_half_precision_keeps_probabilities_that_a_mean_would_lose() -> None:
    """1 / (rows x classes) is below fp16's smallest number here."""
    torch.manual_seed(0)
    arguments = _draw(2100, 4, 9000, torch.float16)
    arguments["hidden"] /= 100
    upstream = torch.tensor(4096.0, device=DEVICE, dtype=torch.float16)  # as loss scaling does
    _, (_, grad, bias) = _gradients(linear_cross_entropy, arguments, upstream)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    _, (_, _, right) = _gradients(reference, wide, upstream.double())
    unseen = torch.ones(9000, dtype=torch.bool, device=DEVICE)
    unseen[arguments["target"].clamp(min=0)] = False
    ratio = bias[unseen].double().sum() / right[unseen].sum()
    assert 0.98 < ratio < 1.02
    assert grad.isfinite().all()


def test_rows_and_weights_of_any_shape_and_spacing() -> None:
    torch.manual_seed(0)
    arguments = _draw(12, 8, 19)
    arguments["hidden"] = arguments["hidden"].view(3, 4, 8).transpose(0, 1)
    arguments["target"] = arguments["target"].view(4, 3)
    arguments["weight"] = arguments["weight"].t().contiguous().t()
    _compare(arguments, torch.randn(4, 3, device=DEVICE), reduction="none")
    _compare(arguments)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(wanted: str, reduction: str) -> None:
    torch.manual_seed(0)
    arguments = _draw(9, 8, 19)
    mine = {**arguments, wanted: arguments[wanted].clone().requires_grad_()}
    true = {**arguments, wanted: arguments[wanted].clone().requires_grad_()}
    (found,) = torch.autograd.grad(linear_cross_entropy(**mine, reduction=reduction).sum(), mine[wanted])
    (right,) = torch.autograd.grad(reference(**true, reduction=reduction).sum(), true[wanted])
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_without_gradients_and_without_rows() -> None:
    torch.manual_seed(0)
    arguments = _draw(9, 8, 19)
    torch.testing.assert_close(linear_cross_entropy(**arguments), reference(**arguments))
    none = {**arguments, "hidden": arguments["hidden"][:0], "target": arguments["target"][:0]}
    for reduction in ("mean", "sum", "none"):
        inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in none.items()}
        loss = linear_cross_entropy(**inputs, reduction=reduction)
        logits = torch.nn.functional.linear(none["hidden"], none["weight"], none["bias"])
        like = torch.nn.functional.cross_entropy(logits, none["target"], reduction=reduction)
        torch.testing.assert_close(loss, like, equal_nan=True)
        grads = torch.autograd.grad(loss.sum(), [inputs[name] for name in ("hidden", "weight", "bias")])
        assert not any(grad.any() for grad in grads)


def test_second_backward_does_not_see_what_became_of_the_first() -> None:
    arguments = _draw(9, 8, 19)
    weight = arguments["weight"].requires_grad_()
    loss = linear_cross_entropy(**arguments)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(kept, second)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_any_size(rows: int, hidden: int, classes: int, at_once: int, seed: int) -> None:
    torch.manual_seed(seed)
    _compare(_draw(rows, hidden, classes), reduction="sum", rows_at_once=at_once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    target = torch.tensor([0, 6, -100, 3], device=DEVICE)
    options: dict[str, Any] = {"softcap": 2.0, "z_loss": 0.5, "reduction": reduction, "rows_at_once": 2}
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, target, **options), (hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_with_gradients(reduction: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = _draw(9, 8, 19, dtype)
    eager = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in arguments.items()}
    names = ("hidden", "weight", "bias")

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return linear_cross_entropy(**values, reduction=reduction, softcap=9.0).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(eager), [eager[name] for name in names])
    right = torch.autograd.grad(loss(eager), [eager[name] for name in names])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for mine, true in zip(found, right):
        torch.testing.assert_close(mine, true, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(compiled(arguments), loss(arguments))


class _Largest(TorchDispatchMode):
    """The most elements of one tensor that is made, apart from gradients of inputs."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self.elements, self.ignored = 0, ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() not in self.ignored:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_never_exist_as_a_whole(reduction: str) -> None:
    arguments = _draw(64, 3, 31)
    inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in arguments.items()}
    with _Largest({64 * 3, 31 * 3}) as largest:
        linear_cross_entropy(**inputs, reduction=reduction, rows_at_once=8).sum().backward()
    assert largest.elements == 8 * 31


def test_plan() -> None:
    assert plan(8192, 4096, 128256, 2) == (4096, False)  # two rounded products
    assert plan(8192, 4096, 128256, 2, at_once=1024) == (1024, False)
    assert plan(8192, 4096, 128256, 2, summed=False) == (1024, False)
    assert plan(8192, 4096, 128256, 4) == (512, False)  # fp32 sums do not mind chunks
    assert plan(65536, 4096, 128256, 2) == (1024, True)
    assert plan(100, 4096, 128256, 2) == (100, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(9)}, "hidden is of 1 dimensions"),
        ({"weight": torch.ones(19, 8, dtype=torch.float16)}, "weight is float16; supported: float32"),
        ({"weight": torch.ones(19, 7)}, r"weight is of shape \(19, 7\); supported: \(classes, 8\)"),
        ({"bias": torch.ones(8)}, r"bias is of shape \(8,\); supported: shape \(19,\)"),
        ({"target": torch.zeros(8, dtype=torch.int64)}, r"target is of shape \(8,\)"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"rows_at_once": 0}, "rows_at_once is 0"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], message: str) -> None:
    arguments = {**_draw(9, 8, 19), **change}
    arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(KernelInputError, match=message):
        linear_cross_entropy(**arguments)
