"""fp8 quantisation, alone and behind norms and SwiGLU: values, scales, saturation, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import fp8, norms_fp8, quantise
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.references import quantise as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _whole(coded: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What codes and scales stand for."""
    q, scale = coded[:2]
    if q.dim() and scale.dim() and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(quantise.GROUP, -1)[..., : q.shape[-1]]
    return q.float() * scale


class Decoded(TritonSuite):
    """Judged by what the codes stand for: neighbouring codes are 6 % or more apart."""

    compute_dtype = torch.float8_e4m3fn
    most_rows = 9 if INTERPRETED else 70

    def run(self):
        coded = super().run()
        return lambda **given: _whole(coded(**given))

    def reference(self):
        coded = getattr(plain, self.kernel.op)
        return lambda **given: _whole(coded(**given))


class TestQuantise(Decoded):
    kernel = KERNELS["quantise_fp8"]

    def arguments(self):
        return {"x": _randn(2, 6, 160), "mode": "block"}


class TestSiluMul(Decoded):
    kernel = KERNELS["silu_mul_fp8"]

    def arguments(self):
        return {"gate": _randn(2, 6, 48), "up": _randn(2, 6, 48, seed=1), "mode": "row"}


class TestRmsNormFp8(Decoded):
    kernel = KERNELS["rms_norm_fp8"]

    def arguments(self):
        return {"x": _randn(2, 6, 48), "weight": _randn(48, seed=1), "mode": "row"}


class TestLayerNormFp8(Decoded):
    kernel = KERNELS["layer_norm_fp8"]

    def arguments(self):
        return {
            "x": _randn(2, 6, 48),
            "weight": _randn(48, seed=1),
            "bias": _randn(48, seed=2),
            "mode": "row",
        }


def _close(mine: tuple[torch.Tensor, ...], true: tuple[torch.Tensor, ...]) -> None:
    assert [x.shape for x in mine] == [x.shape for x in true] and mine[0].dtype == true[0].dtype
    torch.testing.assert_close(mine[1], true[1], rtol=1e-5, atol=0)
    one, other = _whole(mine), _whole(true)
    torch.testing.assert_close(one, other, rtol=0.13, atol=float(true[1].max()) * 2**-8)
    changed = (one - other).abs() > other.abs() * 1e-4 + 1e-12
    assert changed.float().mean() <= 0.02, "more codes differ than roundings at a tie explain"


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    mode=st.sampled_from(plain.MODES),
    scale=st.sampled_from((1e-6, 1.0, 1e4)),
    dtype=st.sampled_from(fp8.FP8),
    spaced=st.booleans(),
)
def test_any_size_scale_and_mode(rows, columns, mode, scale, dtype, spaced) -> None:
    x = _randn(rows, columns * 2) * scale
    x = x[:, :columns] if spaced else x[:, :columns].contiguous()
    _close(quantise.quantise_fp8(x, mode, dtype=dtype), plain.quantise_fp8(x, mode, dtype=dtype))


@pytest.mark.parametrize("mode", plain.MODES)
@pytest.mark.parametrize("name", ("rms_norm_fp8", "layer_norm_fp8"))
def test_norms_with_a_residual_return_the_sum(name: str, mode: str) -> None:
    x, residual, weight = _randn(5, 200), _randn(5, 200, seed=1), _randn(200, seed=2)
    arguments = {"x": x, "weight": weight, "residual": residual, "mode": mode}
    mine, true = getattr(norms_fp8, name)(**arguments), getattr(plain, name)(**arguments)
    torch.testing.assert_close(mine[2], true[2], rtol=0, atol=0)
    _close(mine[:2], true[:2])


def test_a_given_scale_saturates_and_nan_stays() -> None:
    x = torch.tensor([[0.0, 1.0, -1e6, float("nan"), float("inf")]], device=DEVICE)
    q, scale = quantise.quantise_fp8(x, "tensor", torch.ones((), device=DEVICE), torch.float8_e4m3fn)
    expected = torch.tensor([[0.0, 1.0, -448.0, float("nan"), 448.0]], device=DEVICE)
    torch.testing.assert_close(q.float(), expected, equal_nan=True)
    assert float(scale) == 1.0


def test_zeros_have_scale_one() -> None:
    for mode in plain.MODES:
        q, scale = quantise.quantise_fp8(torch.zeros(3, 130, device=DEVICE), mode)
        assert not q.float().any() and bool((scale == 1).all())


def test_traced_whole() -> None:
    x, residual = _randn(4, 48), _randn(4, 48, seed=1)

    def step(x, residual):
        q, scale, total = norms_fp8.rms_norm_fp8(x, residual=residual)
        return q.float() * scale, total

    traced = torch.compile(step, fullgraph=True, backend="aot_eager")(x, residual)
    torch.testing.assert_close(traced, step(x, residual))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "x is int32; supported: bfloat16, float16, float32"),
        ({"mode": "column"}, "mode is 'column'; supported: row, block, tensor"),
        ({"dtype": torch.int8}, "dtype is int8; supported: float8_e4m3fn, float8_e4m3fnuz"),
        ({"scale": torch.ones(2)}, "scale is of shape .*one number in the mode 'tensor'"),
        ({"x": torch.zeros(2, 20000)}, "x is of shape .*1 to 16384 columns"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, "x is a tensor that requires grad"),
    ],
)
def test_what_is_refused_is_named(change, message: str) -> None:
    given = {"x": torch.zeros(2, 8), **change}
    given = {
        name: value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }
    with pytest.raises(KernelInputError, match=f"^quantise_fp8: {message}"):
        quantise.quantise_fp8(**given)


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(KernelInputError, match=r"rms_norm_fp8: weight is of shape \(9,\); supported"):
        norms_fp8.rms_norm_fp8(torch.zeros(2, 8, device=DEVICE), torch.ones(9, device=DEVICE))
