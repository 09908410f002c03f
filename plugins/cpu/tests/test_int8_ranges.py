"""Factors by which int8 evens out how wide the channels of an activation are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse

from kpt.specs import Variant
from kpt_plugin_cpu.int8 import Int8
from kpt_plugin_cpu.int8_linear import Int8Linear, smoothing

#: A few channels a hundred times as wide as the others, as behind norms with large weights.
WIDE = torch.cat([torch.full((4,), 100.0), torch.ones(124)])
FLOAT32 = Variant("linears, float32 between", params={"rest": "float32"}, predicted_gain=2.0)


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


def calibrated(model: nn.Module, x: torch.Tensor) -> Int8:
    behaviour = Int8()
    behaviour.calibrate(model, None, lambda: model(x))  # type: ignore[arg-type]
    return behaviour


@torch.no_grad()
def test_wide_channels_do_not_cost_the_others_their_digits():
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64).eval(), torch.randn(256, 128) * WIDE
    linear.weight.mul_(1.0 / WIDE)  # so that all channels matter alike
    plain = relative(Int8Linear(linear)(x), linear(x))
    even = relative(
        Int8Linear(linear, 1 / smoothing(linear.weight.abs().amax(0), x.abs().amax(0)))(x), linear(x)
    )
    assert even < 0.25 * plain and even < 0.02


@torch.no_grad()
def test_channels_are_divided_by_powers_of_two_of_mean_one():
    torch.manual_seed(0)
    factors = smoothing(torch.rand(128) + 0.1, torch.rand(128) * WIDE + 0.1)
    assert torch.equal(factors.log2(), factors.log2().round())
    assert abs(float(factors.log2().mean())) < 0.5
    assert float(factors[:4].mean()) > 4 * float(factors[4:].mean())


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_channels_without_a_range_are_left_as_they_are(value):
    weights, largest = torch.rand(128) + 0.5, torch.rand(128) + 0.5
    largest[5], weights[7] = value, 0.0
    factors = smoothing(weights, largest)
    assert factors[5] == 1.0 and factors[7] == 1.0 and torch.isfinite(factors).all() and (factors > 0).all()
    assert torch.equal(smoothing(weights, torch.zeros(128)), torch.ones(128))


@torch.no_grad()
def test_the_ranges_come_from_the_model_and_no_hook_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).eval()
    x = torch.randn(64, 128) * WIDE
    expected = model(x)
    behaviour = calibrated(model, x)
    assert not any(module._forward_pre_hooks for module in model.modules())
    undo = behaviour.apply(model, FLOAT32)
    assert model[0].inverse is not None and model[2].inverse is not None
    assert relative(model(x), expected) < 0.02
    undo()
    assert type(model[0]) is nn.Linear and torch.equal(model(x), expected)


@torch.no_grad()
def test_hooks_are_taken_off_where_a_call_fails():
    model = nn.Sequential(nn.Linear(128, 128)).eval()

    def run() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Int8().calibrate(model, None, run)  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_linear_that_no_example_reaches_has_no_factors():
    model = nn.ModuleDict({"used": nn.Linear(128, 128), "idle": nn.Linear(128, 128)}).eval()
    behaviour = Int8()
    behaviour.calibrate(model, None, lambda: model["used"](torch.randn(4, 128)))  # type: ignore[arg-type]
    behaviour.apply(model, FLOAT32)
    assert model["used"].inverse is not None and model["idle"].inverse is None


class Heads(nn.Module):
    """Two linears of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = (nn.Linear(128, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.left(x) + self.right(x))


@torch.no_grad()
def test_linears_of_one_input_divide_and_round_it_once_in_compiled_code():
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(64, 128) * WIDE
    expected = model(x)
    behaviour = calibrated(model, x)
    behaviour.apply(model, FLOAT32)
    assert model.left.inverse is model.right.inverse and model.left.inverse is not model.last.inverse
    assert relative(model(x), expected) < 0.02
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=backend))
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    common = fx_graph_cse(graphs[0].graph)  # as inductor does it when it freezes
    assert sum(str(node.target).startswith("aten.amax") for node in common.nodes) == 2


class Unusual(nn.Module):
    """Calls a linear by keyword, and asks another for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(input=x).to(self.second.weight.dtype))


@torch.no_grad()
def test_linears_called_by_keyword_or_asked_for_their_weight():
    torch.manual_seed(0)
    model, x = Unusual().eval(), torch.randn(64, 128) * WIDE
    expected = model(x)
    behaviour = calibrated(model, x)
    undo = behaviour.apply(model, FLOAT32)
    assert model.first.inverse is not None and model.second.weight.dtype is torch.float32
    assert relative(model(x), expected) < 0.02
    undo()


@torch.no_grad()
def test_a_channel_that_is_tiny_in_the_examples_takes_no_digits_from_the_others_later():
    torch.manual_seed(0)
    linear, x = nn.Linear(128, 64).eval(), torch.randn(64, 128)
    x[:, 5] *= 1e-9
    layer = Int8Linear(linear, 1 / smoothing(linear.weight.abs().amax(0), x.abs().amax(0)))
    later = torch.randn(64, 128)
    assert relative(layer(later), linear(later)) < 0.2
