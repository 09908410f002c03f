"""Modules and functions that the plugin's recognisers find, and look-alikes that stay alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_ops import found

from kpt import ops

X = torch.randn(2, 12, 5, 7, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def claimed(model: nn.Module, op: str, *args: Any) -> ops.Site:
    recognition = found(model, *args)
    sites = [site for site in recognition.of(op) if site.path == ""]
    assert len(sites) == 1, (recognition.sites, recognition.left_alone)
    assert set(sites[0].modes) == {"inference", "training"}
    return sites[0]


def test_the_reference_in_a_claims_place_returns_what_the_model_does() -> None:
    model = nn.Sequential(nn.GroupNorm(3, 12, eps=1e-3), nn.SiLU())
    site = claimed(model, "group_norm", X)
    torch.testing.assert_close(site.run(ops.reference("group_norm", _registry()), X), model(X))


def _registry() -> Any:
    from triton_ops import REGISTRY

    return REGISTRY


# -- group_norm


class InGroups(nn.Module):
    """A group norm in other words; subclasses change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(12)), nn.Parameter(torch.zeros(12))

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], 6, -1)
        rows = rows - rows.mean(-1, keepdim=True)
        return (rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + 1e-5)).reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(x) * self.scale[:, None, None] + self.shift[:, None, None]


class Unbiased(InGroups):
    def normed(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], 6, -1)
        return ((rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-5)).reshape(x.shape)


class OtherChannels(InGroups):
    """Groups of every sixth channel, not of neighbours."""

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        return super().normed(turned).unflatten(1, (6, 2)).transpose(1, 2).flatten(1, 2)


class ScaledTwice(InGroups):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale[:, None, None]


class Capped(InGroups):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-2.0, 2.0)


@pytest.mark.parametrize(
    ("model", "groups", "weighed"),
    [
        (nn.GroupNorm(4, 12), "self.num_groups", True),
        (nn.GroupNorm(1, 12, affine=False), "self.num_groups", False),
        (nn.GroupNorm(12, 12), "self.num_groups", True),
        (InGroups(), "6", True),
    ],
)
def test_group_norms_are_found(model: nn.Module, groups: str, weighed: bool) -> None:
    arguments = claimed(model, "group_norm", X).binding.arguments
    assert arguments["groups"] == groups and ("weight" in arguments) == weighed
    assert "activation" not in arguments


def test_a_silu_behind_a_group_norm_belongs_to_it_and_another_activation_does_not() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 12), nn.SiLU())
    assert claimed(model, "group_norm", X).binding.arguments["activation"] == "'silu'"
    other = found(nn.Sequential(nn.GroupNorm(4, 12), nn.ReLU()), X)
    assert [site.path for site in other.of("group_norm")] == ["0"]


def test_a_named_call_of_group_norm_is_found() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.mix = nn.Parameter(torch.ones(12)), nn.Conv2d(12, 12, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(F.group_norm(self.mix(x), 3, self.scale, None, 1e-3))

    (site,) = found(Calls(), X).of("group_norm")
    assert site.kind == "call" and site.binding.arguments["groups"] == "num_groups"


@pytest.mark.parametrize("model", [Unbiased(), OtherChannels(), ScaledTwice(), Capped()])
def test_what_looks_like_a_group_norm_is_left_alone(model: nn.Module) -> None:
    assert not found(model, X).of("group_norm")


def test_a_layer_norm_stays_one() -> None:
    assert [site.op for site in found(nn.LayerNorm(12), torch.randn(5, 12)).sites] == ["layer_norm"]


# -- bias_activation and glu


class TanhByHand(nn.Module):
    factor = 0.044715

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + self.factor * x.pow(3))))


class OtherFactor(TanhByHand):
    factor = 0.0447


class Quick(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Gated(nn.Module):
    """An activation of one half times the other."""

    act = staticmethod(F.silu)
    axis = -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=self.axis)
        return self.act(second) * first


class ProjectedGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.proj(x).chunk(2, dim=-1)
        return first * F.gelu(second)


class ByTanh(Gated):
    act = staticmethod(torch.tanh)


class OtherAxis(Gated):
    axis = 0


class BothActed(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return F.silu(second) * F.silu(first)


class TwoInputs(nn.Module):
    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up


def _behind(last: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(16, 24), last)


@pytest.mark.parametrize(
    ("build", "activation"),
    [
        (TanhByHand, "gelu_tanh"),
        (_behind(nn.GELU()), "gelu"),
        (_behind(nn.ReLU()), "relu"),
        (_behind(TanhByHand()), "gelu_tanh"),
    ],
)
def test_activations_are_found(build: Callable[[], nn.Module], activation: str) -> None:
    assert claimed(build(), "bias_activation", ROWS).binding.arguments["activation"] == repr(activation)


@pytest.mark.parametrize("build", [OtherFactor, Quick, _behind(nn.Sigmoid()), _behind(Quick()), nn.GELU])
def test_other_activations_and_pytorchs_own_kernels_are_left_alone(build: Callable[[], nn.Module]) -> None:
    assert not [site for site in found(build(), ROWS).of("bias_activation") if site.path == ""]


def test_the_activation_inside_a_layer_that_is_served_whole_is_not_served_again() -> None:
    from kpt.kernels import supported
    from kpt.specs import KernelSpec

    recognition = found(nn.Sequential(nn.Linear(16, 24), TanhByHand()), ROWS)
    assert {site.path for site in recognition.of("bias_activation")} == {"", "1"}
    spec = KernelSpec("bias_activation", "toy", "nowhere:nothing")
    assert [site.path for site in supported(spec, recognition.sites, "inference")[0]] == [""]


@pytest.mark.parametrize(
    ("model", "gate", "activation"),
    [
        (Gated(), "x.chunk(2, dim=-1)[1]", "silu"),
        (ProjectedGate(), "both.chunk(2, dim=-1)[1]", "gelu"),
    ],
)
def test_gates_are_found(model: nn.Module, gate: str, activation: str) -> None:
    arguments = claimed(model, "glu", ROWS).binding.arguments
    assert (arguments["gate"], arguments["activation"]) == (gate, repr(activation))


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def joined(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return x * other


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 48), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = swiglu(self.first(x))
        return self.last(joined(y, y + 1.0))


def test_a_function_that_gates_is_found_and_a_product_is_not_even_tried() -> None:
    recognition = found(ByFunction(), ROWS)
    (site,) = recognition.of("glu")
    assert (site.kind, site.callee) == ("function", "swiglu")
    assert not any("joined" in where for where, _ in recognition.left_alone)


def test_a_gate_of_two_inputs_is_found() -> None:
    arguments = claimed(TwoInputs(), "glu", ROWS, ROWS + 1).binding.arguments
    assert (arguments["gate"], arguments["activation"]) == ("gate", "'gelu_tanh'")


@pytest.mark.parametrize("model", [nn.GLU(), ByTanh(), OtherAxis(), BothActed()])
def test_what_looks_like_a_gate_is_left_alone(model: nn.Module) -> None:
    assert not found(nn.Sequential(model), ROWS).of("glu")


def test_a_value_that_two_arguments_share_is_computed_once() -> None:
    model = ProjectedGate()
    site = claimed(model, "glu", ROWS)
    assert site.binding.source().count("torch.nn.functional.linear") == 1
    assert site.weights() == {"activation": "gelu"}
    assert site.binding.to_dict()["values"] == {
        "both": "torch.nn.functional.linear(x, self.proj.weight, self.proj.bias)"
    }
    torch.testing.assert_close(site.run(ops.reference("glu", _registry()), ROWS), model(ROWS))


# -- add_layer_norm


class PostNorm(nn.Module):
    """What a block with norms behind its sublayers ends with."""

    def __init__(self, project: bool = True) -> None:
        super().__init__()
        self.dense = nn.Linear(24, 16) if project else nn.Identity()
        self.norm = nn.LayerNorm(16, eps=1e-12)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.norm(self.combined(self.dense(hidden), residual))

    def combined(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden + residual


class Halved(PostNorm):
    def combined(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return hidden + 0.5 * residual


class Unnormed(PostNorm):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dense(hidden)) + residual


@pytest.mark.parametrize("project", [True, False])
def test_the_norm_of_a_sum_is_found(project: bool) -> None:
    hidden = torch.randn(3, 5, 24 if project else 16)
    arguments = claimed(PostNorm(project), "add_layer_norm", hidden, torch.randn(3, 5, 16)).binding.arguments
    assert arguments["eps"] == "self.norm.eps"
    assert arguments["weight"] == "self.norm.weight"
    assert ("linear" in arguments["x"]) == project


@pytest.mark.parametrize("kind", [Halved, Unnormed])
def test_other_sums_are_left_alone(kind: type[PostNorm]) -> None:
    assert not found(kind(), torch.randn(3, 5, 24), torch.randn(3, 5, 16)).of("add_layer_norm")


# -- linear_cross_entropy and embedding_sum_norm


class HeadWithLoss(nn.Module):
    def __init__(self, weighed: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(16, 20)
        self.classes = torch.rand(20) + 0.5 if weighed else None

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(hidden), labels, self.classes)


def test_a_head_with_its_loss_is_found() -> None:
    labels = torch.randint(0, 20, (6,))
    arguments = claimed(HeadWithLoss(), "linear_cross_entropy", ROWS, labels).binding.arguments
    assert arguments == {
        "hidden": "hidden",
        "target": "labels",
        "weight": "self.head.weight",
        "bias": "self.head.bias",
    }
    assert not found(HeadWithLoss(weighed=True), ROWS, labels).of("linear_cross_entropy")


class Embeddings(nn.Module):
    def __init__(self, scale: float = 1.0, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=0)
        self.places = nn.Embedding(96, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.scale = scale
        self.position_ids = nn.Buffer(torch.arange(96)[None], persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.places(self.position_ids[:, : ids.shape[1]])
        return self.norm(self.scale * self.words(ids) + places)


@pytest.mark.parametrize("size", [(40, 16), (30000, 96), (30522, 768)])
@pytest.mark.parametrize("length", [9, 16, 96])
def test_embeddings_are_found_also_where_the_proof_needs_smaller_tables(
    size: tuple[int, int], length: int
) -> None:
    ids = torch.randint(0, size[0], (3, length))
    arguments = claimed(Embeddings(1.0, *size), "embedding_sum_norm", ids).binding.arguments
    assert arguments["words"] == "self.words.weight"
    assert arguments["position_ids"] == "self.position_ids[:, :ids.shape[1]]"
    assert arguments["padding_idx"] == "self.words.padding_idx"


def test_embeddings_that_are_scaled_are_left_alone() -> None:
    ids = torch.randint(0, 40, (3, 9))
    assert not found(Embeddings(4.0), ids).of("embedding_sum_norm")
