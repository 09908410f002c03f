"""The C++ before and after an int8 product: the values of the operations that it stands for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied, observe, relative, variants

from kpt.compiling import CompiledForward
from kpt.specs import Variant
from kpt.transaction import workspace
from kpt_plugin_cpu import int8
from kpt_plugin_cpu.inductor import compiler, settings
from kpt_plugin_cpu.int8 import Int8
from kpt_plugin_cpu.int8_linear import Int8Linear
from kpt_plugin_cpu.native_int8 import quantize_rows, rescale_rows

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.bfloat16)


def written_out(x: torch.Tensor, inverse: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return Int8Linear(nn.Linear(x.shape[1], 8), inverse)._quantized_rows(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (7, 128), (300, 1000)])
def test_rows_are_rounded_as_written_out(dtype, even, rows, width):
    torch.manual_seed(rows)
    x = (torch.randn(rows, width) * torch.logspace(-6, 6, rows)[:, None]).to(dtype)
    inverse = torch.rand(width) + 0.5 if even else None
    codes, scales = quantize_rows(x, inverse)
    expected, wide = written_out(x, inverse)
    assert codes.dtype is torch.uint8 and scales.shape == (rows,)
    assert torch.allclose(scales, wide[:, 0], rtol=1e-6)
    off = (codes.int() - expected.int()).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.01  # halves are rounded up here


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_stay_by_themselves(dtype):
    x = torch.randn(5, 40).to(dtype)
    x[1, 3], x[2, 39], x[3] = float("nan"), float("-inf"), 0.0
    layer = Int8Linear(nn.Linear(40, 16), native=True)
    output = layer(x)
    assert output[1].isnan().all() and output[2].isnan().all()
    assert torch.equal(output[3].float(), layer.bias.to(dtype).float())
    assert output[0].isfinite().all() and output[4].isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_scaled_and_rounded_as_torch_rounds(dtype, bias):
    torch.manual_seed(1)
    product, scales = (1e3 * torch.randn(50, 333)).to(dtype), torch.rand(50)
    product[7, 5] = float("inf")
    product[8, 6] = float("nan")
    added = torch.randn(333) if bias else None
    expected = product.float() * scales[:, None] + (added if bias else 0.0)
    assert torch.equal(rescale_rows(product, scales, added).nan_to_num(), expected.to(dtype).nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_no_rows(dtype):
    x = torch.randn(64, 6).to(dtype).t()
    assert torch.equal(quantize_rows(x)[0], quantize_rows(x.contiguous())[0])
    assert quantize_rows(x[:0])[0].shape == (0, 64)
    assert rescale_rows(x[:0], torch.rand(0), None).shape == (0, 64)
    assert torch.equal(rescale_rows(x, torch.ones(6), None), x)


def test_compilers_know_the_shapes_of_both():
    x, inverse = torch.randn(8, 32), torch.rand(32)
    torch.library.opcheck(torch.ops.kpt_cpu.quantize_rows.default, (x, inverse))
    torch.library.opcheck(torch.ops.kpt_cpu.rescale_rows.default, (x, torch.rand(8), torch.rand(32)))


@torch.no_grad()
@pytest.mark.parametrize("rest", ["float32", "bfloat16"])
def test_the_policy_uses_it_and_compiled_code_agrees(rest):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)).eval()
    x = torch.randn(2, 16, 128)
    expected = model(x)
    behaviour = Int8()
    variant = Variant(rest, params={"rest": rest})
    behaviour.calibrate(model, variant, lambda: model(x))
    behaviour.apply(model, variant)
    with torch.profiler.profile() as profile:
        output = model(x)
    names = {event.key for event in profile.key_averages()}
    assert {"kpt_cpu::quantize_rows", "kpt_cpu::rescale_rows"} <= names
    assert float((output - expected).norm() / expected.norm()) < 0.03
    compiled = CompiledForward(model.forward, **settings({"freeze": True, "onednn": True}))
    assert torch.allclose(compiled(x), output, atol=0.02)
    with torch.profiler.profile() as profile:
        compiled(x)
    assert not any("rows" in event.key for event in profile.key_averages()), (
        "inductor fuses what is written out"
    )
    compiled.dispose()


def test_without_a_compiler_it_is_written_out(monkeypatch):
    monkeypatch.setattr(int8, "compiler", lambda: None)
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    (offer, *_) = variants(Int8(), observe(model, torch.randn(2, 128)))
    Int8().apply(model, offer)
    assert [module.native for module in model] == [False]


@pytest.mark.parametrize("wrong", [torch.rand(7), torch.rand(8).double(), torch.rand(16)[::2]])
def test_what_is_no_contiguous_float32_of_the_size_is_refused(wrong):
    x = torch.randn(8, 8)
    with pytest.raises(ValueError, match="inverse is"):
        quantize_rows(x, wrong)
    with pytest.raises(ValueError, match="scales is"):
        rescale_rows(x, wrong, None)
    with pytest.raises(ValueError, match="bias is"):
        rescale_rows(x, torch.rand(8), wrong)


def test_the_first_use_is_announced(monkeypatch):
    model = nn.Sequential(nn.Linear(128, 128)).eval()
    seconds = []
    for ready in (False, True):
        monkeypatch.setattr(int8.native_int8, "ready", lambda ready=ready: ready)
        seconds.append(variants(Int8(), observe(model, torch.randn(2, 128)))[0].setup_seconds)
    assert seconds[0] - seconds[1] >= 2.0


class _Passthrough(CompiledForward):
    """Keeps the operations of the graphs that it captured."""

    def __init__(self, forward, backend) -> None:
        self.operations: list[str] = []

        def noted(graph, example_inputs):
            self.operations += [str(node.target) for node in graph.graph.nodes]
            return graph

        super().__init__(forward, backend=backend, graph_pass=noted)


@torch.no_grad()
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_that_no_compiler_fuses_has_the_c_functions_and_packs_once(native, dtype, monkeypatch):
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(256, 64), native=native), torch.randn(9, 256).to(dtype)
    packed = []
    pack = torch.ops.kpt_cpu.pack_int8
    captured = _Passthrough(layer.forward, "eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.kpt_cpu, "pack_int8", lambda weight: packed.append(weight) or pack(weight))
        true = layer(x)
        for _ in range(3):
            assert torch.equal(captured(x), true)
    assert len(packed) == 1 and captured.executions == 3
    assert any("quantize_rows" in name for name in captured.operations) == native
    assert not any("pack_int8" in name for name in captured.operations)
    compiled = _Passthrough(layer.forward, "aot_eager")
    assert torch.allclose(compiled(x).float(), true.float(), atol=0.05)
    assert any("pack_int8" in name for name in compiled.operations)
    assert not any("quantize_rows" in name or "int8_product" in name for name in compiled.operations)


@torch.no_grad()
def test_a_transposed_weight_is_packed_by_its_rows():
    linear, x = nn.Linear(64, 64, bias=False), torch.randn(8, 64)
    linear.weight = nn.Parameter(torch.randn(64, 64).t())
    expected = linear(x)
    assert (Int8Linear(linear)(x) - expected).norm() < 2e-2 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_layers_that_eager_fuses_call_their_int8_linears(layers: int) -> None:
    """The fused operation would take the weights that were replaced."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, activation="gelu", batch_first=True).eval()
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval() if layers > 1 else layer
    x = torch.randn(2, 9, 128)
    true = model(x)
    (offer, *_) = variants(Int8(), observe(model, x))
    behaviour, space, undo = applied(Int8, model, offer)
    found = space.forward(x)
    assert behaviour.verify_applied(space) and 1e-5 < relative(found, true) < 4e-2
    undo()
    assert torch.equal(model(x), true)
    assert all(
        m.activation_relu_or_gelu == 2 for m in space.modules() if hasattr(m, "activation_relu_or_gelu")
    )


@torch.no_grad()
def test_encoders_that_leave_padding_out_by_nested_tensors_run_in_int8() -> None:
    """Which they do in inference, with a padding mask: their outputs are zero where the padding is."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 9, 128), torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 5:] = mask[2, 2:] = True
    call = {"src": x, "src_key_padding_mask": mask}
    true = model(**call)
    (offer, *_) = variants(Int8(), observe(model, call))
    behaviour, space = Int8(), workspace.clone(model)
    behaviour.calibrate(space, offer, lambda: space(**call))
    undo = behaviour.apply(space, offer)
    found = space.forward(**call)
    assert behaviour.verify_applied(space) and 1e-5 < relative(found, true) < 4e-2
    assert not found[mask].any() and not true[mask].any()
    undo()
    assert torch.equal(space.forward(**call), true)


class OwnFeedForward(nn.TransformerEncoderLayer):
    """Has another network between its norms, and none of the linears that the class comes with."""

    def __init__(self) -> None:
        super().__init__(128, 4, 256, batch_first=True)
        del self.linear1, self.linear2
        self.wide = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128))

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        src = self.norm1(src + self._sa_block(src, None, None))
        return self.norm2(src + self.wide(src))


@torch.no_grad()
def test_layers_without_the_linears_of_their_class_run_in_int8() -> None:
    torch.manual_seed(0)
    model, x = OwnFeedForward().eval(), torch.randn(2, 9, 128)
    (offer, *_) = variants(Int8(), observe(model, x))
    _, space, undo = applied(Int8, model, offer)
    assert 1e-5 < relative(space.forward(x), model(x)) < 4e-2
    undo()
