"""Skinny products against fp64: values, layouts, sizes, quantised weights, sites."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite

import kpt_plugin_triton.plugin as plugin
from kpt.judge.calls import Call
from kpt.judge.kernels import inputs_like, judge_kernel
from kpt.ops import recognise, reference
from kpt.testing.models import op_site
from kpt_plugin_triton import fp8, skinny, skinny_sites
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED, overlaps
from kpt_plugin_triton.references import skinny as references
from kpt_plugin_triton.references.skinny import dequantised

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
KERNELS = {(spec.op, spec.name): spec for spec in plugin.kpt_kernels()}
LIKE = {"device": DEVICE, "dtype": DTYPES[-1]}
STARTS_EARLY = not INTERPRETED and torch.cuda.is_available() and overlaps(torch.cuda.current_device())
QUANTISED = {"int8": skinny.linear_int8, "fn": skinny.linear_fp8, "fnuz": skinny.linear_fp8}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def quantised(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "int8":
        return skinny.quantise_int8(weight)
    return skinny.quantise_fp8(weight, torch.float8_e4m3fn if kind == "fn" else torch.float8_e4m3fnuz)


def assert_right(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias=None, then=None) -> None:
    """Within 1.3 times what the eager product in the same dtype is off by, and a rounding of the output."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    eager = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    if then is not None:
        exact, eager = then(exact), then(eager)
    assert found.shape == exact.shape and found.dtype == x.dtype
    off = (found.double() - exact).norm()
    allowed = 1.3 * (eager.double() - exact).norm() + torch.finfo(x.dtype).eps / 2 * exact.norm()
    assert off <= allowed, f"off by {off:.3g}, allowed {allowed:.3g}"


class TestLinear(TritonSuite):
    kernel = KERNELS["linear", "triton"]

    def arguments(self):
        return {"x": randn(2, 5, 32), "weight": randn(48, 32, seed=1), "bias": randn(48, seed=2)}


class TestLinearInt8(TritonSuite):
    kernel = KERNELS["linear_int8", "triton"]

    def arguments(self):
        weight, scale = skinny.quantise_int8(randn(48, 32))
        return {"x": randn(2, 5, 32, seed=1), "weight": weight, "scale": scale, "bias": randn(48)}

    def reference(self):
        return references.linear_int8


class TestLinearFp8(TritonSuite):
    kernel = KERNELS["linear_fp8", "triton"]

    def arguments(self):
        weight, scale = skinny.quantise_fp8(randn(48, 32))
        return {"x": randn(2, 5, 32, seed=1), "weight": weight, "scale": scale, "bias": randn(48)}

    def reference(self):
        return references.linear_fp8

    def _judge(self, dtype, place, probes):
        run, make = self._ready()
        fixed = frozenset({"weight"})
        found = judge_kernel(
            run, self.reference(), make, level="exact", fixed=fixed, dtypes=(dtype,), **probes
        )
        assert found.passed, f"{dtype}: {found.rule}: {found.detail}"

    def _ready(self):
        # codes of fp8 are no floating-point numbers to draw anew: some are NaN
        return self.run(), inputs_like(self.arguments(), fixed=frozenset({"weight"}))


@pytest.mark.parametrize("width", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepared_sites(width: str, dtype: torch.dtype) -> None:
    """A site's weight is quantised once; what comes out passes the rule for quantised arithmetic."""
    found = op_site("linear", dtype, DEVICE)
    assert found is not None
    site, call = found
    run = {"int8": skinny_sites.prepare_int8, "fp8": skinny_sites.prepare_fp8}[width](site)
    given = {name: value.detach() for name, value in site.arguments(*call.args).items()}
    fixed = frozenset({"weight", "bias"})
    verdict = judge_kernel(
        run,
        reference("linear"),
        inputs_like(given, fixed=fixed),
        level="aggressive",
        compute_dtype="int8",
        fixed=fixed,
    )
    assert verdict.passed, f"{verdict.rule}: {verdict.detail}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
@pytest.mark.parametrize("features, depth", [(1, 16), (37, 100), (130, 1024), (16, 5000)])
def test_values(rows: int, features: int, depth: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, depth, dtype=dtype), randn(features, depth, seed=1, dtype=dtype)
    assert_right(skinny.linear(x, weight), x, weight)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("activation", skinny.ACTIVATIONS)
def test_bias_and_activation(rows: int, activation: str) -> None:
    x, weight, bias = randn(rows, 64), randn(24, 64, seed=1), randn(24, seed=2)
    found = skinny.linear(x, weight, bias, activation)
    assert_right(found, x, weight, bias, skinny.ACTIVATIONS[activation])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("depth", [48, 4100])
def test_quantised_weights(rows: int, kind: str, depth: int) -> None:
    x, weight = randn(rows, depth), randn(19, depth, seed=1)
    weight[3] = 0.0
    packed, scale = quantised(weight, kind)
    assert scale[3] == 1.0 and scale.shape == (19,) and scale.dtype == torch.float32
    relative = (dequantised(packed, scale, torch.float32) - weight).norm() / weight.norm()
    assert relative < (0.01 if kind == "int8" else 0.04)
    for factor in (scale, scale[:1].clone(), scale[0]):
        exact = packed.double() * factor.double().reshape(-1, 1)
        found = QUANTISED[kind](x, packed, factor, randn(19, seed=3), "silu")
        assert_right(found, x, exact, randn(19, seed=3), F.silu)


@pytest.mark.parametrize("bias", [7, 8])
def test_every_fp8_value_is_decoded(bias: int) -> None:
    """All 256 bit patterns, NaN included, through a product with the unit matrix."""
    dtype = torch.float8_e4m3fn if bias == 7 else torch.float8_e4m3fnuz
    codes = torch.arange(256, device=DEVICE).to(torch.uint8).view(dtype).reshape(256, 1)
    weight = torch.zeros(256, 16, device=DEVICE).to(dtype).view(torch.uint8)
    weight[:, :1] = codes.view(torch.uint8)
    one = torch.zeros(1, 16, dtype=torch.float16, device=DEVICE)
    one[0, 0] = 1.0
    for rows in (1, 3):
        found = skinny.linear_fp8(one.expand(rows, 16), weight.view(dtype), torch.ones(1, device=DEVICE))
        torch.testing.assert_close(found, codes.half().T.expand(rows, 256), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("splits", [2, 3, 32])
def test_split_depth(rows: int, splits: int) -> None:
    """Any number of parts, more than there are steps too, with the epilogue behind the sum."""
    x, weight, bias = randn(rows, 1000), randn(21, 1000, seed=1), randn(21, seed=2)
    packed, scale = skinny.quantise_int8(weight)
    options = {"BLOCK_N": 16, "BLOCK_K": 128, "SPLITS": splits, "STAGES": 1, "num_warps": 4, "num_stages": 2}
    found = skinny._run(x, weight, None, bias, "gelu", options)
    assert_right(found, x, weight, bias, F.gelu)
    found = skinny._run(x, packed, scale, bias, "none", options)
    assert_right(found, x, dequantised(packed, scale, torch.float32), bias)


@pytest.mark.skipif(not STARTS_EARLY, reason="needs sm_90 or later")
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_programs_that_start_early_see_what_was_written_just_before(rows: int) -> None:
    """Input, weight and the memory of the output may all belong to the kernel before."""
    options = {"BLOCK_N": 16, "BLOCK_K": 256, "SPLITS": 1, "num_warps": 2, "num_stages": 6, "EARLY": 4}
    given = options if rows > 1 else None
    x, weight = torch.empty(rows, 4096, **LIKE), torch.empty(4090, 4096, **LIKE)
    sources = [(torch.randn_like(x), torch.randn_like(weight)) for _ in range(3)]
    right = [F.linear(*source) for source in sources]
    for number in range(60):
        for into, source in zip((x, weight), sources[number % 3]):
            into.copy_(source)
        found = skinny._run(x, weight, None, None, "none", given)
        again = skinny._run(x, weight, None, None, "none", given)
        x.fill_(float("nan"))
        weight.fill_(float("nan"))
        torch.testing.assert_close(found, right[number % 3], rtol=2e-2, atol=1.0)
        assert torch.equal(found, again)


def test_splits_fill_the_device() -> None:
    assert skinny._splits(0, programs=256, steps=32, count=132) == 1
    assert skinny._splits(0, programs=64, steps=32, count=132) == 3
    assert skinny._splits(0, programs=1, steps=6, count=132) == 1, "parts of four steps at least"
    assert skinny._splits(4, programs=999, steps=3, count=132) == 3


def test_layouts() -> None:
    """Rows spaced apart, x in another order, a bias with steps, a transposed weight."""
    x, weight, bias = randn(4, 80), randn(24, 80, seed=1), randn(48, seed=2)[::2]
    assert_right(skinny.linear(x[:, 8:72], weight[:, 8:72], bias), x[:, 8:72], weight[:, 8:72], bias)
    assert_right(skinny.linear(x[1:2, 1:], weight[:, 1:]), x[1:2, 1:], weight[:, 1:])
    turned = randn(80, 4, seed=3).T
    assert_right(skinny.linear(turned, weight), turned, weight)
    stored = randn(80, 24, seed=4)
    assert_right(skinny.linear(x, stored.T), x, stored.T)
    packed, scale = skinny.quantise_int8(weight)
    wide = torch.stack([scale, scale], 1).reshape(-1)[::2]
    assert_right(skinny.linear_int8(x, packed, wide), x, dequantised(packed, scale, torch.float32))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    assert skinny.linear(randn(*shape), randn(8, 32)).shape == (*shape[:-1], 8)


def test_no_features_and_no_depth() -> None:
    assert skinny.linear(randn(3, 32), randn(0, 32)).shape == (3, 0)
    bias = randn(5)
    torch.testing.assert_close(skinny.linear(randn(3, 0), randn(5, 0), bias), bias.expand(3, 5))


@pytest.mark.parametrize("kind", [None, *QUANTISED])
def test_other_calls_are_right_too(kind: str | None) -> None:
    """More rows than a tile, and gradients."""
    x, weight, bias = randn(17, 32), randn(24, 32, seed=1), randn(24, seed=2)
    leaf = randn(3, 32).requires_grad_()
    if kind is None:
        assert_right(skinny.linear(x, weight, bias), x, weight, bias)
        skinny.linear(leaf, weight, bias, "relu").sum().backward()
        return
    packed, scale = quantised(weight, kind)
    assert_right(QUANTISED[kind](x, packed, scale, bias), x, dequantised(packed, scale, x.dtype), bias)
    QUANTISED[kind](leaf, packed, scale, bias).sum().backward()
    expected = dequantised(packed, scale, torch.float32).sum(0).expand(3, 32)
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=1e-2, atol=1e-2)


def test_reproducible() -> None:
    x, weight = randn(16, 4096), randn(20, 4096, seed=1)
    assert torch.equal(skinny.linear(x, weight), skinny.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 16, 40])
def test_inside_a_graph(rows: int) -> None:
    x, weight, bias = randn(rows, 64), randn(24, 64, seed=1), randn(24, seed=2)
    packed, scale = skinny.quantise_fp8(weight)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return skinny.linear(x, weight, bias, "silu"), skinny.linear_fp8(x, packed, scale, bias)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for mine, expected in zip(found, both(x), strict=True):
        torch.testing.assert_close(mine, expected)


def test_gradients_inside_a_graph() -> None:
    weight = randn(24, 64, seed=1)
    x = randn(3, 64).requires_grad_()
    torch.compile(lambda x: skinny.linear(x, weight), fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.float().sum(0).half().expand(3, 64), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"x": torch.zeros(2, 8)}, "x is float32; supported: bfloat16, float16"),
        ({"x": 1.0}, "x is a float"),
        ({"weight": torch.zeros(4, 8, dtype=torch.bfloat16)}, "weight is bfloat16; supported: float16"),
        ({"weight": torch.zeros(4, 9).half()}, r"weight is of shape \(4, 9\); supported: \[N, 8\]"),
        ({"weight": torch.zeros(1, 4, 8).half()}, "weight is of shape"),
        ({"bias": torch.zeros(5).half()}, r"bias is of shape \(5,\); supported: shape \(4,\)"),
        ({"activation": "swish"}, "activation is 'swish'; supported: none, silu"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    given = {"x": torch.zeros(2, 8).half(), "weight": torch.zeros(4, 8).half(), **arguments}
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    with pytest.raises(KernelInputError, match=message):
        skinny.linear(**moved)


def test_refusals_of_quantised_weights() -> None:
    x, scale = randn(2, 8), torch.ones(4, device=DEVICE)
    packed = torch.zeros(4, 8, dtype=torch.int8, device=DEVICE)
    with pytest.raises(KernelInputError, match="weight is int8; supported: float8_e4m3fn"):
        skinny.linear_fp8(x, packed, scale)
    with pytest.raises(KernelInputError, match="weight is float16; supported: int8"):
        skinny.linear_int8(x, packed.half(), scale)
    with pytest.raises(KernelInputError, match="scale is float64; supported: bfloat16"):
        skinny.linear_int8(x, packed, scale.double())
    with pytest.raises(KernelInputError, match=r"scale is of shape \(3,\); supported: \[4\] or one number"):
        skinny.linear_int8(x, packed, scale[:3])
    for quantise in (skinny.quantise_int8, skinny.quantise_fp8):
        with pytest.raises(ValueError, match="floating-point matrix"):
            quantise(packed)


@settings(deadline=None, max_examples=15)
@given(
    rows=st.integers(1, 16),
    features=st.integers(1, 70),
    depth=st.integers(1, 300),
    kind=st.sampled_from([None, *QUANTISED]),
    with_bias=st.booleans(),
)
def test_any_size(rows: int, features: int, depth: int, kind: str | None, with_bias: bool) -> None:
    x, weight = randn(rows, depth), randn(features, depth, seed=1)
    bias = randn(features, seed=2) if with_bias else None
    if kind is None:
        assert_right(skinny.linear(x, weight, bias), x, weight, bias)
        return
    packed, scale = quantised(weight, kind)
    exact = packed.double() * scale.double()[:, None]
    assert_right(QUANTISED[kind](x, packed, scale, bias), x, exact, bias)


@pytest.mark.parametrize("rows, taken", [(1, True), (16, True), (17, False)])
def test_sites(rows: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_sites, "on_gpu", lambda site: None)
    module = torch.nn.Linear(32, 48)
    with torch.no_grad():
        (site,) = recognise(module, [Call((torch.randn(rows, 32),))]).sites
    for supports in (skinny_sites.supports, skinny_sites.supports_quantised):
        refusal = supports(site)
        assert (refusal is None) == taken, refusal
        assert taken or f"{rows} rows" in str(refusal)


def test_order_of_attempts() -> None:
    """Measured on an H200: cuDNN's attention before ours; weights of a byte gain more than those of two."""
    gains = {key: spec.predicted_gain for key, spec in KERNELS.items()}
    assert gains["attention", "sdpa-cudnn"] > gains["attention", "triton"]
    assert gains["linear", "triton"] < gains["linear_int8", "triton"]


def test_flavours() -> None:
    """Which fp8 is whose, and who can convert it."""
    assert fp8.fp8_of("gfx942") == torch.float8_e4m3fnuz and fp8.largest(fp8.fp8_of("gfx942")) == 240.0
    assert fp8.fp8_of("gfx950") == torch.float8_e4m3fn and fp8.largest(fp8.fp8_of("sm_90")) == 448.0
    converting = {"sm_89": 1, "sm_90": 1, "sm_100": 1, "gfx950": 1, "sm_80": 0, "gfx90a": 0, "gfx942": 0}
    for arch, expected in converting.items():
        assert fp8.converts(arch, torch.float8_e4m3fn) == bool(expected), arch
    assert fp8.converts("gfx942", torch.float8_e4m3fnuz) and not fp8.converts("sm_90", torch.float8_e4m3fnuz)
