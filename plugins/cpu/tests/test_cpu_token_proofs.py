"""What treats tokens apart is told from what mixes them by trying it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kpt.compiling import CapturedForward
from kpt_plugin_cpu.token_proofs import Axes, Proofs

WIDTH = 24
X = torch.randn(WIDTH, WIDTH)
APART = {
    "linear": lambda x: functional.linear(x, X),
    "matmul": lambda x: x @ X,
    "norm": lambda x: functional.layer_norm(x, (WIDTH,)),
    "softmax of features": lambda x: x.softmax(-1),
    "heads": lambda x: x.view(x.shape[0], x.shape[1], 4, -1),
    "flat": lambda x: x.reshape(-1, WIDTH),
    "sorted features": lambda x: x.sort(-1).values,
}
MIXED = {
    "sum so far": lambda x: x.cumsum(1),
    "softmax of positions": lambda x: x.softmax(1),
    "reversed": lambda x: x.flip(1),
    "rolled": lambda x: x.roll(1, 1),
    "centred": lambda x: functional.batch_norm(x.transpose(0, 1), None, None, training=True).transpose(0, 1),
    "scaled by all": lambda x: functional.normalize(x, dim=(0, 1)),
    "sorted positions": lambda x: x.sort(1).values,
    "of one number": lambda x: x / x.abs().max(),
    "of a little of all": lambda x: torch.add(x, x.mean(), alpha=1e-3),
    "rows rolled": lambda x: x.roll(2, 0),
    "rolled around": lambda x: x.roll(35, 1),
    "triangle": lambda x: x.triu(-6),
    "random": lambda x: functional.dropout(x, 0.5, training=True),
}


@pytest.mark.parametrize(("name", "holds"), [(n, True) for n in APART] + [(n, False) for n in MIXED])
@torch.no_grad()
def test_what_treats_tokens_apart_is_found_by_trying_it(name, holds):
    results = []

    def look(graph, example_inputs):
        given = [n.meta["example_value"] for n in graph.graph.find_nodes(op="placeholder")]
        (shape,) = (v.shape for v in given if isinstance(v, torch.Tensor) and v.dim() == 3)
        axes = Axes(*(size.node.shape_env.simplify(size.node.expr) for size in shape[:2]))
        proofs = Proofs(axes, {})
        nodes = [n for n in graph.graph.nodes if n.op.startswith("call_")]
        made = [n for n in nodes if isinstance(n.meta.get("example_value"), (torch.Tensor, tuple))]
        results.append(all(proofs.holds(n) for n in made))
        return graph

    function = {**APART, **MIXED}[name]
    captured = CapturedForward(lambda x: function(x), look, dynamic_dims={"x": {0: "batch", 1: "length"}})
    captured(x=torch.randn(3, 6, WIDTH))
    assert results == [holds]
