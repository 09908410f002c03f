"""Regions of captured graphs that the plugin's recognisers find: what is there, served, or left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_ops import REGISTRY, captured, found_in_graph

from kpt import ops
from kpt.ops.presence import possible_ops


def substituted(op: str, model: nn.Module, *args: Any) -> ops.Site:
    """The only site of ``op``; with its reference in place the graph returns what it did."""
    gm, inputs = captured(model, *args)
    (site,) = ops.recognise_graph(gm, registry=REGISTRY, only={op}).sites
    assert op in possible_ops(lambda: model(*args), REGISTRY)
    with torch.no_grad():
        expected = gm(*inputs)
        ops.substitute(gm, site, ops.reference(op, REGISTRY))
        served = gm(*inputs)
    for one, other in zip(served, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return site


# -- linear_cross_entropy


class Language(nn.Module):
    """A head and its loss as language models compute them; subclasses change one thing each."""

    def __init__(self, classes: int = 50, width: int = 16) -> None:
        super().__init__()
        self.classes = classes
        self.words, self.head = nn.Embedding(classes, width), nn.Linear(width, classes, bias=False)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
        logits = self.logits(ids).float().view(-1, self.classes)
        return F.cross_entropy(logits, shifted, ignore_index=-100, reduction="mean")


class Capped(Language):
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return 30.0 * torch.tanh(super().logits(ids) / 30.0)


class Shorter(Language):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.logits(ids)[..., :-1, :].contiguous().view(-1, self.classes)
        return F.cross_entropy(logits, labels[..., 1:].reshape(-1), ignore_index=3, label_smoothing=0.1)


class ReturnsLogits(Language):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.logits(ids)
        return F.cross_entropy(logits.view(-1, self.classes), labels.view(-1)), logits


class Weighed(Language):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Any:
        weight = torch.arange(self.classes, dtype=torch.float32)
        return F.cross_entropy(self.logits(ids).view(-1, self.classes), labels.view(-1), weight)


class Tempered(Language):
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return super().logits(ids) / 0.7


def tokens(classes: int = 50) -> torch.Tensor:
    return torch.randint(0, classes, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "cap"), [(Language, None), (Capped, "30.0"), (Shorter, None)])
def test_the_loss_of_a_language_model_is_found(kind: type[Language], cap: str | None) -> None:
    site = substituted("linear_cross_entropy", kind(), tokens(), tokens())
    assert site.binding.arguments.get("softcap") == cap


def test_a_large_head_is_proved_with_a_smaller_one_and_keeps_its_sizes() -> None:
    site = substituted("linear_cross_entropy", Language(9000, 128), tokens(9000), tokens(9000))
    weight = site.weights()["weight"]
    assert weight.shape == (9000, 128) and weight.device.type == "meta"
    assert site.examples[0].shapes["x"] == (2, 9, 128)


@pytest.mark.parametrize("kind", [ReturnsLogits, Weighed, Tempered])
def test_a_loss_whose_logits_are_needed_or_differ_is_left_alone(kind: type[Language]) -> None:
    assert not found_in_graph("linear_cross_entropy", kind(), tokens(), tokens()).sites


# -- qk_norm_rope


class Attends(nn.Module):
    """Heads that are normed and rotated before they attend."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 32), nn.Linear(16, 16)
        self.of_q, self.of_k = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8) + 0.5)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.norm(self.q(x).unflatten(-1, (-1, 8)), self.of_q)
        return q, self.norm(self.k(x).unflatten(-1, (-1, 8)), self.of_k)

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k = (heads.transpose(1, 2) for heads in self.heads(x))
        return self.turned(q, cos, sin), self.turned(k, cos, sin)


class OtherEpsilon(Attends):
    """No kernel has an epsilon for each of the two."""

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.norm(self.q(x).unflatten(-1, (-1, 8)), self.of_q)
        return q, self.norm(self.k(x).unflatten(-1, (-1, 8)), self.of_k, 1e-3)


class OnlyQueries(Attends):
    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().heads(x)[0], self.k(x).unflatten(-1, (-1, 8))


def rotary() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angles = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    return torch.randn(2, 5, 16), angles.cos(), angles.sin()


def test_normed_and_rotated_heads_are_found() -> None:
    arguments = substituted("qk_norm_rope", Attends(), *rotary()).binding.arguments
    assert arguments["q"] == "x.transpose(1, 2)" and arguments["eps"] == "1e-06"


@pytest.mark.parametrize("kind", [OtherEpsilon, OnlyQueries])
def test_heads_that_are_normed_otherwise_are_left_alone(kind: type[Attends]) -> None:
    assert not found_in_graph("qk_norm_rope", kind(), *rotary()).sites


# -- norms of sums, gates and activations


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(F.silu(self.one(x)) * self.two(x)).sin())


class AlsoTheSum(Block):
    def forward(self, x: torch.Tensor) -> Any:
        total = x + self.down(F.gelu(self.one(x)))
        return self.norm(total), total


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(x.sin()))


@pytest.mark.parametrize(
    ("op", "kind", "outputs"),
    [
        ("add_layer_norm", Block, 1),
        ("add_layer_norm", AlsoTheSum, 2),
        ("glu", Block, 1),
        ("bias_activation", AlsoTheSum, 1),
    ],
)
def test_inline_arithmetic_is_found(op: str, kind: type[Block], outputs: int) -> None:
    assert len(substituted(op, kind(), torch.randn(3, 5, 16)).outputs) == outputs


def test_a_group_norm_in_a_graph_takes_its_silu_along() -> None:
    gm, _ = captured(Grouped(), torch.randn(2, 8, 3, 3))
    sites = ops.recognise_graph(gm, registry=REGISTRY, only={"group_norm"}).sites
    assert sites[0].binding.arguments["activation"] == "'silu'"


class Raises:
    """A stranger's recogniser with a bug: it loses only its own."""

    marks = {"glu": ("silu",)}

    def regions(self, graph: torch.fx.Graph) -> Any:
        raise LookupError("no such node")


def test_a_recogniser_that_raises_while_it_looks_loses_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.ops import index

    known = index.recognisers(REGISTRY)
    monkeypatch.setattr(index, "recognisers", lambda registry=None: [Raises(), *known])
    recognition = found_in_graph("glu", Block(), torch.randn(3, 5, 16))
    assert len(recognition.sites) == 1
    assert ("", "the recogniser Raises raised LookupError: no such node") in recognition.left_alone
