"""Multi-head attention in captured graphs: written out where it is plain, and equal to eager's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import applied

from kpt.compiling import CompiledForward
from kpt.specs import Variant
from kpt_plugin_cpu.inductor import Inductor, compiler
from kpt_plugin_cpu.multihead import written_out

WIDTH = 16


class Attends(nn.Module):
    """``how`` calls the attention with the tensor in its layout; what it yields is used afterwards."""

    def __init__(self, how: str, **options: object) -> None:
        super().__init__()
        self.how = how
        self.attention = nn.MultiheadAttention(WIDTH, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1 if self.attention.batch_first else 0]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        if self.how == "plain":
            y, _ = self.attention(x, x, x, need_weights=False)
        elif self.how == "causal":
            y, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)
        elif self.how == "mask":
            y, _ = self.attention(x, x, x, need_weights=False, attn_mask=mask)
        elif self.how == "weights":
            y, weights = self.attention(x, x, x)
            y = y + weights.mean()
        elif self.how == "cross":
            y, _ = self.attention(x, x * 2, x + 1, need_weights=False)
        elif self.how == "same keys":
            y, _ = self.attention(x * 2, x, x, need_weights=False)
        return y.sin() + x


def captured(model: nn.Module, **options: object) -> tuple[CompiledForward, list[str]]:
    operations: list[str] = []

    def noted(graph, example_inputs):
        graph = written_out(graph, example_inputs)
        operations.extend(str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
        return graph

    return CompiledForward(model.forward, backend="eager", graph_pass=noted, **options), operations


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("how", ["plain", "causal", "mask", "weights", "cross", "same keys"])
def test_values_are_those_of_the_module(how: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Attends(how, batch_first=batch_first).eval(), torch.randn(5, 7, WIDTH)
    forward, operations = captured(model)
    torch.testing.assert_close(forward(x), model(x))
    written = "multi_head_attention_forward" not in operations
    assert written == (how in ("plain", "causal")) == ("scaled_dot_product_attention" in operations)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": WIDTH, "vdim": WIDTH}],
)
def test_options_of_the_module_are_kept(options: dict[str, object]) -> None:
    torch.manual_seed(1)
    model, x = Attends("plain", **options).eval(), torch.randn(5, 7, WIDTH)
    forward, _ = captured(model)
    torch.testing.assert_close(forward(x), model(x))


@torch.no_grad()
def test_what_has_no_batch_and_what_drops_out_is_left() -> None:
    model, x = Attends("plain").eval(), torch.randn(7, WIDTH)
    forward, operations = captured(model)
    torch.testing.assert_close(forward(x), model(x))
    assert "multi_head_attention_forward" in operations
    dropping = Attends("plain", dropout=0.5).train()
    forward, operations = captured(dropping)
    forward(torch.randn(5, 7, WIDTH))
    assert "multi_head_attention_forward" in operations


@torch.no_grad()
def test_sizes_that_were_declared_dynamic_stay_so() -> None:
    model = Attends("causal", batch_first=True).eval()
    forward, operations = captured(model, dynamic_dims={"x": {0: "batch", 1: "length"}})
    for batch, length in [(5, 7), (3, 9), (2, 4)]:
        x = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(forward(x), model(x))
    assert forward.graphs == 1 and "scaled_dot_product_attention" in operations


class Projects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(x.transpose(0, 1))


@torch.no_grad()
def test_linears_get_their_inputs_contiguous() -> None:
    """Torch would copy the weights for each batch and multiply these."""
    model, x = Projects().eval(), torch.randn(5, 7, WIDTH)
    forward, operations = captured(model)
    torch.testing.assert_close(forward(x), model(x))
    assert operations.count("contiguous") == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.wide, self.back = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x += self.back(self.wide(self.after(x)).relu())
        return x


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@torch.no_grad()
def test_layers_of_transformers_are_compiled_with_packed_weights() -> None:
    model, x = nn.Sequential(*(Block() for _ in range(8))).eval(), torch.randn(3, 7, WIDTH)
    choice = {
        "freeze": False,
        "onednn": True,
        "repeated": True,
        "dims": {},
        "bounds": {},
        "eager_random": True,
    }
    behaviour, space, undo = applied(Inductor, model, Variant("repeated blocks", choice))
    torch.testing.assert_close(space.forward(x), model(x), rtol=1e-4, atol=1e-5)
    assert behaviour.verify_applied(space)
    assert len(behaviour.compiled.graph_pass.packed.packed) == 4 * 8
    undo()


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_that_eager_fuses_are_written_out(norm_first: bool, activation: str) -> None:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 32, norm_first=norm_first, activation=activation, batch_first=True, layer_norm_eps=1e-3
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(5, 7, WIDTH)
    forward, operations = captured(model)
    torch.testing.assert_close(forward(x), model(x))
    assert operations.count("scaled_dot_product_attention") == 2
    assert not any("encoder_layer" in name for name in operations if "_module" not in name)


PAIRS = torch.ones(7, 7, dtype=torch.bool).triu(1)
PADDING = torch.arange(7) >= torch.tensor([7, 5, 3, 1, 6])[:, None]


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {"mask": PAIRS},
        {"mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True},
        {"mask": (torch.rand(5 * 4, 7, 7) > 0.7) & ~torch.eye(7, dtype=torch.bool)},
        {"src_key_padding_mask": PADDING},
        {"mask": PAIRS, "src_key_padding_mask": PADDING},
    ],
    ids=["pairs", "causal", "by head", "padding", "both"],
)
def test_fused_layers_with_masks_are_written_out(masks: dict[str, Any], norm_first: bool) -> None:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(5, 7, WIDTH)
    forward, operations = captured(model)
    torch.testing.assert_close(forward(x, **masks), model(x, **masks))
    assert operations.count("scaled_dot_product_attention") == 2
    assert not any("encoder_layer" in name for name in operations if "_module" not in name)


@torch.no_grad()
def test_a_row_without_a_key_attends_to_nothing() -> None:
    """The fused operation makes NaN of it, and in the layers after it of all."""
    torch.manual_seed(4)
    model = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True).eval()
    barred = PAIRS.clone()
    barred[2] = True
    x = torch.randn(5, 7, WIDTH)
    forward, _ = captured(model)
    found, true = forward(x, src_mask=barred), model(x, src_mask=barred)
    assert found.isfinite().all()
    rows = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(found[:, rows], true[:, rows])
