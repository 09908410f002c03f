"""Whole forwards by OpenVINO: values, structure, sizes, dtypes, threads."""

from __future__ import annotations

import copy
import gc
import threading
from collections import Counter

import pytest
import torch
from observing import PROFILE, observe, relative
from openvino_cases import Net, applied, mlp, offer
from torch import nn

from kpt.specs import Variant
from kpt.transaction import workspace
from kpt_plugin_cpu.bf16 import Bf16
from kpt_plugin_cpu.channels_last import ChannelsLast
from kpt_plugin_openvino import lowering
from kpt_plugin_openvino.whole import OpenVino
from kpt_plugin_openvino.widening import widened


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 64])  # copied into the request's memory, and shared with it
def test_the_same_values_and_structure_and_its_undo_restores(size):
    model, x = Net().eval(), torch.randn(2, 3, size, size)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    behaviour, space, undo = applied(model, x)
    assert not behaviour.verify_applied(space)
    for _ in range(3):
        x = torch.randn(2, 3, size, size)
        found, expected = space.forward(x), model(x)
        assert list(found) == list(expected)
        assert all(found[n].dtype is expected[n].dtype and found[n].shape == expected[n].shape for n in found)
        assert all(relative(found[n], expected[n]) < 1e-6 for n in ("map", "logits", "best", "positive"))
    assert behaviour.verify_applied(space)
    undo()
    assert "forward" not in space.__dict__
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


half = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no products in bfloat16"
)


@half
@torch.no_grad()
def test_a_cast_model_is_computed_in_bfloat16():
    model, x = mlp(256), torch.randn(32, 16)
    space = workspace.clone(model)
    take_back = Bf16().apply(space, Variant("cast", compute_dtype="bfloat16"))
    undo = OpenVino().apply(space, offer(observe(model, x)))
    found = space.forward(x)
    assert found.dtype is torch.float32
    assert 1e-5 < relative(found, model(x)) < 2e-2
    undo()
    take_back()


class Branches(nn.Module):
    """Two ways with a norm each, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Sequential(_plain(3, 32), _plain(32, 32)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.ways[0](x) + self.ways[1](x))


def _plain(into: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Casting(Branches):
    """Names bfloat16 in its forward, and holds it in a constant of the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.tensor([0.5], dtype=torch.bfloat16)
        return super().forward(x.to(torch.bfloat16).bfloat16() * half).to(dtype=torch.bfloat16)


@half
@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "dims"), [(Branches, None), (Casting, None), (Casting, {"x": {0: "batch"}})]
)
def test_norms_and_sums_are_folded_into_convolutions_in_bfloat16(kind, dims, monkeypatch):
    """OpenVINO does so for graphs in float32 alone; what goes in and comes out stays in bfloat16."""
    compiled, compile_model = [], lowering._compiled

    def kept(*given: object, **options: object) -> object:
        compiled.append(compile_model(*given, **options))
        return compiled[-1]

    monkeypatch.setattr(lowering, "_compiled", kept)
    model = kind().eval().bfloat16()
    behaviour, space, undo = applied(model, torch.randn(2, 3, 16, 16, dtype=torch.bfloat16), dims=dims)
    for rows in (2, 5) if dims else (2, 2):
        x = torch.randn(rows, 3, 16, 16, dtype=torch.bfloat16)
        found, expected, true = space.forward(x), model(x), kind().double()
        true.load_state_dict(model.state_dict())
        exact = Branches.forward(true.eval(), x.double() * (0.5 if kind is Casting else 1.0))
        assert found.dtype is torch.bfloat16
        assert relative(found, exact) < 1.5 * relative(expected, exact)
    undo()
    assert compiled[0].outputs[0].element_type.to_string() == "bf16", "cast by OpenVINO's threads"
    monkeypatch.setattr(lowering, "_convolves", lambda weights: False)
    behaviour, space, undo = applied(model, x, dims=dims)
    space.forward(x)
    undo()
    wide, narrow = (
        Counter(op.get_rt_info()["layerType"].astype(str) for op in one.get_runtime_model().get_ops())
        for one in compiled
    )
    assert wide["Convolution"] == narrow["Convolution"] == 4
    apart = ("Subgraph", "Eltwise", "Reshape")  # passes over memory of their own
    assert sum(wide[name] for name in apart) < sum(narrow[name] for name in apart)


def test_bits_read_as_something_else_are_left_alone():
    def captured(forward) -> torch.fx.GraphModule:
        graphs: list[torch.fx.GraphModule] = []
        run = torch.compile(forward, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        run(torch.ones(4, 4, dtype=torch.bfloat16))
        return graphs[0]

    assert widened(captured(lambda x: x.view(torch.int16).bitwise_and(1)), {}) is None
    assert widened(captured(lambda x: (x.view(torch.int16) & -2).view(torch.bfloat16)), {}) is None
    assert widened(captured(lambda x: x.type("torch.BFloat16Tensor") * 2), {}) is None
    assert widened(captured(lambda x: x.view(2, 8) * 2), {}) is not None


@half
@torch.no_grad()
def test_weights_in_another_layout_and_dtype_are_those_of_the_model():
    model, x = Net().eval(), torch.randn(2, 3, 16, 16)
    space = workspace.clone(model)
    for behaviour in (Bf16(), ChannelsLast()):
        (variant,) = [v for v in behaviour.propose(observe(model, x), PROFILE) if isinstance(v, Variant)]
        behaviour.apply(space, variant)
    OpenVino().apply(space, offer(observe(model, x)))
    for _ in range(3):
        x = torch.randn(2, 3, 16, 16)
        assert relative(space.forward(x)["map"], model(x)["map"]) < 2e-2


@half
@torch.no_grad()
@pytest.mark.parametrize("dims", [None, {"input": {0: "rows"}}])
def test_inputs_and_outputs_may_be_in_bfloat16(dims):
    model = mlp(256).bfloat16()
    wide = copy.deepcopy(model).float()
    _, space, undo = applied(model, torch.randn(32, 16).bfloat16(), dims=dims)
    for rows in (32, 7) if dims else (32, 32):
        x = torch.randn(rows, 16).bfloat16()
        found = space.forward(x)
        assert found.dtype is torch.bfloat16 and found.shape == (rows, 4)
        assert relative(found, wide(x.float())) < 2e-2
    undo()


@torch.no_grad()
def test_results_belong_to_the_caller_and_inputs_stay_as_they_are():
    for rows in (2, 4096):
        model = mlp()
        _, space, undo = applied(model, torch.randn(rows, 16))
        first, second = torch.randn(rows, 16), torch.randn(2 * rows, 16)[::2]
        kept = first.clone(), second.clone()
        found = [space.forward(first), space.forward(second)]
        assert relative(found[0], model(first)) < 1e-6 and relative(found[1], model(second)) < 1e-6
        assert torch.equal(first, kept[0]) and torch.equal(second, kept[1])
        found[0].zero_()
        assert relative(space.forward(first), model(first)) < 1e-6
        undo()
        assert relative(found[1], model(second)) < 1e-6


@torch.no_grad()
def test_declared_sizes_share_one_graph():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    names = {"src": {0: "batch", 1: "length"}}
    behaviour, space, undo = applied(model, torch.randn(3, 8, 32), dims=names)
    for batch, length in ((3, 8), (2, 5), (7, 31), (3, 2)):
        x = torch.randn(batch, length, 32)
        assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.compiled.graphs == 1
    undo()


@torch.no_grad()
def test_sizes_that_are_not_declared_get_graphs_of_their_own_until_it_is_sealed():
    model = mlp()
    behaviour, space, undo = applied(model, torch.randn(8, 16))
    for rows in (8, 3):
        x = torch.randn(rows, 16)
        assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.compiled.graphs == 2
    behaviour.compiled.seal()
    x = torch.randn(5, 16)
    assert torch.equal(space.forward(x), model(x)) and behaviour.compiled.misses == 1
    undo()


def test_several_threads_call_it_at_once():
    model = mlp()
    inputs = [torch.randn(32, 16) for _ in range(8)]
    with torch.no_grad():
        _, space, undo = applied(model, inputs[0])
        space.forward(inputs[0])
        expected = [model(x) for x in inputs]
    wrong: list[int] = []
    finished: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if relative(space.forward(inputs[number]), expected[number]) > 1e-6:
                    wrong.append(number)
        finished.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(finished) == 8
    undo()


def test_it_is_called_in_any_mode_of_autograd():
    model, x = mlp(), torch.randn(8, 16)
    _, space, undo = applied(model, x)
    with torch.inference_mode():
        assert relative(space.forward(x), model(x)) < 1e-6
        assert space.forward(torch.randn(8, 16)).is_inference()
    with torch.no_grad():
        assert not space.forward(x).is_inference()
        assert relative(space.forward(x.clone().requires_grad_()), model(x)) < 1e-6
    undo()


@torch.no_grad()
def test_numbers_flags_and_empty_batches():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor):
            y = torch.where(keep[:, None], self.layer(x) * scale, 0.0)
            return y, y.sum(), keep.logical_not()

    model = Scaled().eval()
    given = torch.randn(6, 16), torch.tensor(2.0), torch.arange(6) > 2
    dims = {"x": {0: "rows"}, "keep": {0: "rows"}}
    _, space, undo = applied(model, *given, dims=dims)
    for rows in (6, 3, 1, 0):
        given = torch.randn(rows, 16), torch.tensor(float(rows)), torch.rand(rows) > 0.5
        for mine, true in zip(space.forward(*given), model(*given), strict=True):
            assert mine.dtype is true.dtype and mine.shape == true.shape
            torch.testing.assert_close(mine, true)
    undo()


@torch.no_grad()
def test_integers_of_more_than_32_bits_are_computed_by_the_captured_graph():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(50, 8)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.rows(ids % 50), ids

    model = Table().eval()
    _, space, undo = applied(model, torch.arange(6))
    for ids in (torch.arange(6), torch.arange(6) + 2**40, torch.arange(6) - 2**35):
        for mine, true in zip(space.forward(ids), model(ids), strict=True):
            assert torch.equal(mine, true)
    undo()


@torch.no_grad()
def test_one_buffer_in_bfloat16_lowers_no_products():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(256)
            self.register_buffer("scale", torch.full((4,), 0.25, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) * self.scale

    model, x = Scaled().eval(), torch.randn(32, 16)
    _, space, undo = applied(model, x)
    assert relative(space.forward(x), model(x)) < 1e-6
    undo()


@half
@torch.no_grad()
def test_constants_in_bfloat16_live_as_long_as_what_reads_them():
    class Literal(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.layer, self.transposed = nn.Linear(64, 64, bias=False), transposed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.arange(64 * 64, dtype=torch.bfloat16).reshape(64, 64) / 4096
            return self.layer(x) @ (table.t() if self.transposed else table)

    for transposed in (False, True):
        model, x = Literal(transposed).bfloat16().eval(), torch.randn(64, 64).bfloat16()
        _, space, undo = applied(model, x)
        space.forward(x)
        gc.collect()
        churn = [torch.full((64, 64), 7.0, dtype=torch.bfloat16) for _ in range(64)]
        assert relative(space.forward(x), model(x)) < 2e-2
        undo()
        del churn
