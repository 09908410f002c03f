"""Recognition in captured graphs, and putting kernels there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops
from kpt.ops.presence import marks, possible_ops


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.fx.GraphModule, Any]:
    """The graph that dynamo captures, with its inputs."""
    grabbed: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        grabbed.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(*args, **kwargs)
    assert len(grabbed) == 1
    return grabbed[0]  # type: ignore[no-any-return]


def substituted(gm: torch.fx.GraphModule, inputs: Any) -> Counter[str]:
    """Substitute references for all sites, compare the results, and count what served."""
    with torch.no_grad():
        expected = gm(*inputs)
        served: Counter[str] = Counter()
        for site in ops.graph_sites(ops.recognise_graph(gm).sites):
            reference = ops.reference(site.op)

            def kernel(*args: Any, _op: str = site.op, _reference: Any = reference, **kwargs: Any) -> Any:
                served[_op] += 1
                return _reference(*args, **kwargs)

            ops.substitute(gm, site, kernel)
        found = gm(*inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return served


class Block(nn.Module):
    """A decoder block with all of its arithmetic inline."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.one
        q, k, v = (f(y).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        scores = q @ k.transpose(-1, -2) * 0.25
        attended = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(-2)
        x = x + attended
        wide = x.float()
        y = (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * (1 + self.two)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos + turned * sin


def test_inline_arithmetic_is_found_and_substituted() -> None:
    table = torch.randn(2, 5, 8)
    gm, inputs = captured(Block(), torch.randn(2, 5, 16), table.cos(), table.sin())
    before = gm.code
    found = {site.op: site for site in ops.recognise_graph(gm).sites}
    assert gm.code == before
    assert found["gated_mlp"].binding.arguments["activation"] == "'silu'"
    assert found["add_rms_norm"].binding.arguments["offset"] == "1.0"
    assert found["add_rms_norm"].binding.arguments["eps"] == "1e-05"
    assert found["attention"].binding.arguments["scale"] == "0.25"
    served = substituted(gm, inputs)
    assert served == {
        "rms_norm": 1,
        "add_rms_norm": 1,
        "rope": 1,
        "attention": 1,
        "gated_mlp": 1,
        "linear": 3,
    }
    assert "rsqrt" not in gm.code and "softmax" not in gm.code.replace("softmax_", "")


def test_inline_layer_norm_and_softmax() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centred = x - x.mean(-1, keepdim=True)
            x = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
            e = torch.exp(x - x.amax(1, keepdim=True))
            return e / e.sum(1, keepdim=True)

    assert substituted(*captured(Inline(), torch.randn(3, 4, 9))) == {"layer_norm": 1, "softmax": 1}


def test_named_calls_with_their_options() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(9, eps=1e-3)
            self.other = nn.LayerNorm(9, eps=1e-4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            x = F.softmax(self.other(self.norm(x)), 0)
            return F.cross_entropy(x, y, ignore_index=2, label_smoothing=0.2)

    served = substituted(*captured(Named(), torch.randn(6, 9), torch.randint(0, 9, (6,))))
    assert served == {"rms_norm": 1, "layer_norm": 1, "softmax": 1, "cross_entropy": 1}


class Almost(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(4 if self.change == "power" else 2).mean(
            (1, 2) if self.change == "axis" else -1, keepdim=True
        )
        x = x * torch.rsqrt(mean + 1e-6)
        if self.change == "clamp":
            x = x.clamp(-1, 1)
        return x * self.weight if self.change != "square" else x * self.weight * self.weight


@pytest.mark.parametrize("change", ["power", "axis"])
def test_arithmetic_that_looks_alike_is_left_alone(change: str) -> None:
    found = ops.recognise_graph(captured(Almost(change), torch.randn(2, 5, 16))[0])
    assert not found.of("rms_norm") and not found.of("layer_norm")


@pytest.mark.parametrize("change", ["clamp", "square"])
def test_only_the_part_that_is_the_op_is_taken(change: str) -> None:
    assert substituted(*captured(Almost(change), torch.randn(2, 5, 16)))["rms_norm"] == 1


def test_a_region_with_a_write_beside_it_is_left_alone() -> None:
    class Writes(nn.Module):
        def __init__(self, inside: bool) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * 2.0
            if not self.inside:
                y.add_(1.0)
            root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            if self.inside:
                y.add_(1.0)
            return y * root, y

    x = torch.randn(3, 8)
    assert substituted(*captured(Writes(False), x)) == {"rms_norm": 1}
    torch.compiler.reset()
    assert substituted(*captured(Writes(True), x)) == {}


def test_only_the_ops_asked_for_are_looked_for_and_their_modules_are_named() -> None:
    model = nn.ModuleDict({"a": nn.RMSNorm(9), "b": nn.Linear(9, 9)})

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.parts["b"](self.parts["a"](x)), -1)

    gm, _ = captured(Outer(), torch.randn(2, 9))
    assert {site.op for site in ops.recognise_graph(gm).sites} == {"rms_norm", "linear", "softmax"}
    (site,) = ops.recognise_graph(gm, only={"rms_norm"}).sites
    assert site.name.startswith("parts.a:")


def test_one_eager_run_tells_which_ops_a_graph_may_hold() -> None:
    norm, x = nn.RMSNorm(9), torch.randn(2, 9)
    assert possible_ops(lambda: norm(x)) == {"rms_norm", "layer_norm", "add_rms_norm"}
    assert possible_ops(lambda: torch.cat((-x, x)).softmax(0)) == {"rope", "softmax", "attention"}
    assert possible_ops(lambda: x + 1.0) == frozenset()
    for model, args in ((Block(), (torch.randn(2, 5, 16), *torch.randn(2, 2, 5, 8))),):
        found = {site.op for site in ops.recognise_graph(captured(model, *args)[0]).sites}
        assert found <= possible_ops(lambda: model(*args)) <= frozenset(marks())  # noqa: B023 - called at once


def test_a_graph_without_the_nodes_is_refused() -> None:
    gm, _ = captured(nn.Linear(4, 4), torch.randn(2, 4))
    other, _ = captured(nn.Sequential(nn.ReLU()), torch.randn(2, 4))
    site = ops.recognise_graph(gm).sites[0]
    with pytest.raises(ValueError, match="has no nodes"):
        ops.substitute(other, site, F.linear)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_decoder(attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    gm, inputs = captured(
        transformers.LlamaForCausalLM(config), input_ids=torch.randint(0, 50, (2, 7)), use_cache=False
    )
    served = substituted(gm, inputs)
    assert (served["rms_norm"], served["add_rms_norm"], served["gated_mlp"], served["rope"]) == (1, 4, 2, 2)
    assert served["attention"] == 2
