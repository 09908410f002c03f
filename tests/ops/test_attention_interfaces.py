"""Attention that is called through an interface, as transformers does, or without mask and causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from called_functions import Attention, X, sites
from kpt import ops
from recognised import Call


@pytest.mark.parametrize("masked", [False, True])
def test_the_attention_interface_of_transformers(masked: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones_like(ids)
    if masked:
        mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    found = ops.recognise(model, [Call((), inputs)])
    attention, rope = found.of("attention"), found.of("rope")
    assert len(attention) == len(rope) == 2 and not found.left_alone
    expected = model(**inputs).logits
    for site in found.sites:
        if site.kind != "module":
            ops.install(model, site, ops.reference(site.op))
    keep = mask.bool()
    torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], rtol=1e-4, atol=1e-5)
    compiled = torch.compile(lambda **k: model(**k).logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs)[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_a_mask_that_transformers_builds_only_where_it_is_captured_reaches_the_kernel() -> None:
    transformers = pytest.importorskip("transformers")
    from kpt.compiling import CompiledForward

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=72, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (1, 20)), "use_cache": False}
    attention = ops.recognise(model, [Call((), inputs)]).of("attention")
    assert len(attention) == 2
    for site in attention:
        (masked,) = site.others
        assert "mask" not in site.binding.arguments and "is_causal" in site.binding.arguments
        assert "mask" in masked.binding.arguments and masked.name == site.name
    with torch.no_grad():
        expected = model(**inputs).logits
        for site in attention:
            ops.install(model, site, ops.reference("attention"))
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = CompiledForward(model.forward, backend=keep)
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert not any("scaled_dot_product" in name for name in called)
    compiled.dispose()


def test_the_soft_cap_that_gemma2_passes_but_sdpa_ignores() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=5.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 50, (1, 7)), "use_cache": False}
    expected = model(**inputs).logits
    for site in ops.recognise(model, [Call((), inputs)]).sites:
        ops.install(model, site, ops.reference(site.op))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_attention_interfaces_with_extras() -> None:
    def capped(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: float, softcap: float) -> Any:
        scores = torch.tanh(q @ k.transpose(-1, -2) * scaling / softcap) * softcap
        return (torch.softmax(scores, -1) @ v).transpose(1, 2), None

    def ignoring(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: float, softcap: float) -> Any:
        return (torch.softmax(q @ k.transpose(-1, -2) * scaling, -1) @ v).transpose(1, 2), None

    table = {"capped": capped, "ignoring": ignoring}

    class Interface(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attend = TABLE[self.name]
            return attend(self, q, k, v, None, scaling=0.3, softcap=4.0)[0]

    global TABLE
    TABLE = table
    heads = [torch.randn(2, 4, 5, 8) for _ in range(3)]
    with_cap = sites(Interface("capped"), *heads)["TABLE[]"]
    without = sites(Interface("ignoring"), *heads)["TABLE[]"]
    assert with_cap.binding.arguments["softcap"] == "softcap" and "softcap" not in without.binding.arguments
    assert without.binding.arguments["scale"] == "scaling"
    assert not with_cap.others and not without.others  # neither heeds a mask


TABLE: dict[str, Any] = {}


class Plain(Attention):
    """Neither causal nor masked, as encoders call it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, _ = self.parts(x)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_attention_without_mask_and_causality_is_found() -> None:
    (site,) = ops.recognise(Plain(), [Call((X,))]).of("attention")
    assert site.binding.arguments["is_causal"] == "is_causal"
