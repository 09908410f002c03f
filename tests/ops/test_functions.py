"""Functions and named calls inside a forward: found, proved, and rebound for one instance only."""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat((-other, one), dim=-1)


def turn_both(q: Any, k: Any, cos: Any, sin: Any, heads_at: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(heads_at), sin.unsqueeze(heads_at)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def turn_pairs(q: Any, k: Any, sin: Any, cos: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        c, s = cos[:, :, None], sin[:, :, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)

    return turn(q), turn(k)


def turn_wrong(q: Any, k: Any, cos: Any, sin: Any) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos - rotate_half(k) * sin


class Attention(nn.Module):
    """q, k and v from one input; ``turn`` and the attention are replaced by subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def parts(self, x: torch.Tensor, at: int = 1) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, 8)) for f in (self.q, self.k, self.v))
        table = torch.arange(x.shape[1])[:, None] * torch.linspace(1, 0.1, 4)[None]
        both = torch.cat((table, table), dim=-1)[None].expand(x.shape[0], -1, -1)
        return (q, k, v, both) if at == 2 else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), both)


class Rotary(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x)
        q, k = turn_both(q, k, table.cos(), table.sin())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class RotaryPairs(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x, at=2)
        q, k = turn_pairs(q, k, table[..., :4].sin(), table[..., :4].cos())
        return torch.softmax(q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2), dim=-1)


class RotaryWrong(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, table = self.parts(x)
        q, k = turn_wrong(q, k, table.cos(), table.sin())
        return nn.functional.softmax(q @ k.transpose(-1, -2), -1, dtype=torch.float32)


X = torch.randn(2, 6, 16)


def sites(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, ops.Site]:
    found = ops.recognise(module, [Call(args, kwargs)])
    named = {site.callee: site for site in found.sites if site.kind != "module"}
    assert named, found.left_alone
    return named


def test_rope_is_found_in_both_layouts_and_both_pairings() -> None:
    half = sites(Rotary(), X)["turn_both"]
    assert half.op == "rope" and half.kind == "function" and half.binding.arguments["interleaved"] == "False"
    pairs = sites(RotaryPairs(), X)["turn_pairs"]
    assert pairs.op == "rope" and pairs.binding.arguments["interleaved"] == "True"
    assert "transpose" in pairs.binding.arguments["q"]


def test_a_rope_with_a_wrong_sign_is_left_alone() -> None:
    found = ops.recognise(RotaryWrong(), [Call((X,))])
    assert not found.of("rope")
    assert any(where == ":turn_wrong" and "something else" in text for where, text in found.left_alone)


def test_named_calls_are_found_by_the_name_that_the_code_uses() -> None:
    attention = sites(Rotary(), X)["F.scaled_dot_product_attention"]
    assert attention.op == "attention" and attention.kind == "call"
    assert sites(RotaryPairs(), X)["torch.softmax"].op == "softmax"
    assert sites(RotaryWrong(), X)["nn.functional.softmax"].op == "softmax"


@pytest.mark.parametrize("cls", [Rotary, RotaryPairs, RotaryWrong])
def test_each_site_runs_the_reference_in_one_instance_only(cls: type[Attention]) -> None:
    module, other = cls(), cls()
    other.load_state_dict(module.state_dict())
    expected = module(X)
    served: list[str] = []

    def counting(op: str) -> Any:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            served.append(op)
            return ops.reference(op)(*args, **kwargs)

        return kernel

    found = sites(module, X)
    undos = [ops.install(module, site, counting(site.op)) for site in found.values()]
    torch.testing.assert_close(module(X), expected)
    assert sorted(served) == sorted(site.op for site in found.values())
    served.clear()
    assert torch.equal(other(X), expected) and not served
    for undo in reversed(undos):
        undo()
    assert "forward" not in vars(module) and torch.equal(module(X), expected) and not served


def test_a_rebound_forward_compiles_in_one_graph() -> None:
    module = Rotary().eval()
    expected = module(X)
    for site in sites(module, X).values():
        ops.install(module, site, ops.reference(site.op))
    compiled = torch.compile(lambda x: module(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)


def test_a_call_outside_the_proof_runs_the_original_function() -> None:
    class Placed(Attention):
        at = 1

        def forward(self, x: torch.Tensor, at: int = 1) -> torch.Tensor:
            q, k, _, table = self.parts(x, at)
            return turn_both(q, k, table.cos(), table.sin(), at)[0]

    module = Placed()
    site = sites(module, X)["turn_both"]
    expected = module(X, 2)
    ops.install(module, site, lambda **_: pytest.fail("the kernel served a call that was not proved"))
    assert torch.equal(module(X, 2), expected)


def test_cross_entropy_in_a_forward() -> None:
    class Loss(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits.view(-1, 9), labels.view(-1), ignore_index=2)

    module = Loss()
    logits, labels = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    site = sites(module, logits, labels)["F.cross_entropy"]
    assert site.op == "cross_entropy"
    expected = module(logits, labels)
    ops.install(module, site, ops.reference("cross_entropy"))
    torch.testing.assert_close(module(logits, labels), expected)


def test_a_loss_that_ignores_a_class_no_example_held_is_left_alone() -> None:
    class Ignoring(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits.view(-1, 9), labels.view(-1), ignore_index=2)

    labels = torch.tensor([[0, 1, 3, 4, 5], [6, 7, 8, 8, 0]])
    found = ops.recognise(Ignoring(), [Call((torch.randn(2, 5, 9), labels))])
    assert [(site.kind, site.binding.arguments["ignore_index"]) for site in found.sites] == [
        ("call", "ignore_index")
    ]
    assert any("integers" in text for _, text in found.left_alone)


def test_the_loss_that_a_transformers_model_holds() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 50, (2, 7))
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    site = ops.recognise(model, [Call((), inputs)]).of("cross_entropy")[0]
    assert site.callee == "self.loss_function" and "1:" in site.binding.arguments["target"]
    expected = model(**inputs).loss
    held = dict(vars(model))
    undo = ops.install(model, site, lambda **arguments: 2 * ops.reference("cross_entropy")(**arguments))
    torch.testing.assert_close(model(**inputs).loss, 2 * expected)
    undo()
    assert vars(model).keys() == held.keys() and torch.equal(model(**inputs).loss, expected)


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


def test_labels_are_proved_where_a_wrong_index_only_raises():
    """Sites on an accelerator that take integers are proved on the CPU: assertions there end the device."""
    from kpt.ops.captured import Seen
    from kpt.ops.examples import Examples

    signature = inspect.signature(lambda logits, target: None)
    accelerator = torch.device("cuda", 0)
    logits = Seen((4, 9), torch.float32, (9, 1), accelerator, None)

    def device_of(call):
        site = types.SimpleNamespace(
            calls=[call], module=torch.nn.Identity(), function=None, signature=signature
        )
        return Examples(site).device

    assert device_of({"logits": logits, "target": None}) == accelerator
    labels = Seen((4,), torch.int64, (1,), accelerator, torch.zeros(4, dtype=torch.int64))
    assert device_of({"logits": logits, "target": labels}) == torch.device("cpu")
    mask = Seen((4,), torch.bool, (1,), accelerator, torch.ones(4, dtype=torch.bool))
    assert device_of({"logits": logits, "target": mask}) == accelerator


class Plain(Attention):
    """Neither causal nor masked, as encoders call it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, _ = self.parts(x)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_attention_without_mask_and_causality_is_found() -> None:
    (site,) = ops.recognise(Plain(), [Call((X,))]).of("attention")
    assert site.binding.arguments["is_causal"] == "is_causal"


class Attends(nn.Module):
    """Attention over a sequence that may be as long as the longest one that the config names."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.config = types.SimpleNamespace(longest=96, heads=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.project(x).view(1, x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


class Cuts(Attends):
    """The same, and its code knows how long the longest is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.project(x[:, : self.config.longest]).view(1, x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(split, split, split)


def shortened(config: Any, x: torch.Tensor) -> torch.Tensor:
    return x[:, : config.longest]


class Shortener:
    def __init__(self, config: Any) -> None:
        self.longest = config.longest

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.longest]

    @staticmethod
    def cut(config: Any, x: torch.Tensor) -> torch.Tensor:
        return shortened(config, x)


class OwnSettings:
    def __init__(self) -> None:
        self.longest, self.heads = 96, 2

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : self.longest]


HELPERS = types.ModuleType("helpers")
HELPERS.inner = types.ModuleType("helpers.inner")  # type: ignore[attr-defined]
HELPERS.inner.shortened, HELPERS.Shortener = shortened, Shortener  # type: ignore[attr-defined]
SHORTENERS = {"first": shortened}


class CutsElsewhere(Attends):
    """Its own code does not name the longest: what it calls does, in this way or that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.cut(x))


class CutsInAModule(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.inner.shortened(self.config, x)


class CutsByAStaticMethod(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.Shortener.cut(self.config, x)


class CutsByAnObject(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.Shortener(self.config)(x)


class CutsByATable(CutsElsewhere):
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return SHORTENERS["first"](self.config, x)


class CutsByAFunctionItHolds(CutsElsewhere):
    def __init__(self) -> None:
        super().__init__()
        self.cut = functools.partial(shortened, self.config)


class CutsByItsConfig(CutsElsewhere):
    def __init__(self) -> None:
        super().__init__()
        self.config = OwnSettings()  # type: ignore[assignment]

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return self.config.cut(x)


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def around(self: Any, x: torch.Tensor) -> Any:
        return function(self, x)

    return around


class CutsUnderADecorator(CutsElsewhere):
    @decorated
    def cut(self, x: torch.Tensor) -> torch.Tensor:
        return HELPERS.inner.shortened(self.config, x)


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Attends, False),
        (Cuts, True),
        (CutsInAModule, True),
        (CutsByAStaticMethod, True),
        (CutsByAnObject, True),
        (CutsByATable, True),
        (CutsByAFunctionItHolds, True),
        (CutsByItsConfig, True),
        (CutsUnderADecorator, True),
    ],
)
def test_a_length_is_kept_where_code_reads_such_a_number(module: type, kept: bool) -> None:
    """Proofs at full length take seconds: the square of it is computed again and again."""
    from kpt.ops.capture import observe
    from kpt.ops.examples import Examples

    given = torch.randn(1, 96, 8)
    functions = observe(module(), [Call((given,))]).functions.values()
    (attention,) = (one for one in functions if one.callee == "F.scaled_dot_product_attention")
    protected = Examples(attention).protected
    assert (96 in protected) is kept and 2 in protected
    found = ops.recognise(module().eval(), [Call((given,))])
    assert [site.op for site in found.sites if site.kind != "module"] == ["attention"], found.left_alone
