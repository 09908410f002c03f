"""Small models and op arguments that standard tests try plugins on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kpt.judge.calls import Call
from kpt.ops import recognise

if TYPE_CHECKING:
    from kpt.ops import Site

ROWS, HIDDEN, HEADS, HEAD = 6, 32, 4, 8


class TinyEncoder(nn.Module):
    """Embedding, one attention block with a mask, a feed-forward and a head: [B, S] → [B, S, 11]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.feed = nn.Sequential(nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN))
        self.head = nn.Linear(HIDDEN, 11)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        batch, sequence, _ = x.shape
        q, k, v = (
            part.view(batch, sequence, HEADS, HEAD).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mask = attention_mask.bool()[:, None, None, :]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, sequence, HIDDEN))
        return self.head(x + self.feed(x))


class TinyVision(nn.Module):
    """Convolutions, batch norm and a classifier: [B, 3, 16, 16] → [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.classifier = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def tiny_models() -> dict[str, tuple[nn.Module, Any]]:
    """(model in eval mode, example inputs) by name; weights are random, with a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask = torch.ones(2, ROWS, dtype=torch.int64)
        mask[1, 4:] = 0
        encoder_inputs = {"input_ids": torch.randint(0, 50, (2, ROWS)), "attention_mask": mask}
        mlp = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4), nn.Softmax(dim=-1)
        )
        return {
            "mlp": (mlp.eval(), torch.randn(3, 16)),
            "vision": (TinyVision().eval(), torch.randn(2, 3, 16, 16)),
            "encoder": (TinyEncoder().eval(), encoder_inputs),
        }


class TinyGatedMLP(nn.Module):
    """A gated feed-forward block: [..., 32] → [..., 32]."""

    def __init__(self, activation: Callable[..., Any] = nn.functional.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(HIDDEN, 48, bias=False)
        self.up = nn.Linear(HIDDEN, 48, bias=False)
        self.down = nn.Linear(48, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class TinyShiftedNorm(nn.Module):
    """An RMS norm that scales by one more than its weight: [..., 32] → [..., 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


#: Modules that compute an op: the typical one, and by the arguments that another one differs in.
_MODULES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "linear": {"": lambda: nn.Linear(HIDDEN, 48), "bias": lambda: nn.Linear(HIDDEN, 48, bias=False)},
    "layer_norm": {
        "": lambda: nn.LayerNorm(HIDDEN),
        "eps": lambda: nn.LayerNorm(HIDDEN, eps=0.5),
        "bias": lambda: nn.LayerNorm(HIDDEN, bias=False),
        "weight bias": lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
    },
    "rms_norm": {
        "": lambda: nn.RMSNorm(HIDDEN, eps=1e-6),
        "eps": lambda: nn.RMSNorm(HIDDEN, eps=0.5),
        "offset": TinyShiftedNorm,
        "weight": lambda: nn.RMSNorm(HIDDEN, eps=1e-6, elementwise_affine=False),
    },
    "gated_mlp": {
        "": TinyGatedMLP,
        "activation": lambda: TinyGatedMLP(nn.functional.gelu),
    },
    "softmax": {"": lambda: nn.Softmax(dim=-1), "dim": lambda: nn.Softmax(dim=1)},
}


def op_site(op: str, dtype: torch.dtype, device: str, other: str = "") -> tuple[Site, Call] | None:
    """A site that computes ``op`` in ``dtype`` and a call of it; None for an op without a module here.

    ``other`` names the arguments in which it is another than the typical one, as `other_arguments` does.
    """
    if other not in _MODULES.get(op, {}):
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _MODULES[op][other]().to(device, dtype).eval()
        x = torch.randn(2, ROWS, HIDDEN).to(device, dtype)
    with torch.no_grad():
        found = recognise(module, [Call((x,))])
    return next(((site, Call((x,))) for site in found.sites if site.op == op), None)


def op_arguments(op: str, generator: torch.Generator) -> Mapping[str, Any] | None:
    """Typical arguments of a catalogued op in fp32, by name; None for an op that is not ours."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = randn(2, ROWS, HIDDEN), randn(HIDDEN)
    q, k, v = (randn(2, HEADS, ROWS, HEAD) for _ in range(3))
    angles = randn(ROWS, HEAD // 2).repeat(1, 2)
    arguments: dict[str, Mapping[str, Any]] = {
        "linear": {"x": x, "weight": randn(48, HIDDEN), "bias": randn(48)},
        "layer_norm": {"x": x, "weight": weight, "bias": randn(HIDDEN), "eps": 1e-5},
        "rms_norm": {"x": x, "weight": weight, "eps": 1e-6, "offset": 0.0},
        "add_rms_norm": {"x": x, "residual": randn(2, ROWS, HIDDEN), "weight": weight, "eps": 1e-6},
        "gated_mlp": {
            "x": x,
            "gate_weight": randn(48, HIDDEN) / 6,
            "up_weight": randn(48, HIDDEN) / 6,
            "down_weight": randn(HIDDEN, 48) / 7,
            "activation": "silu",
        },
        "rope": {"q": q, "k": k, "cos": angles.cos()[None], "sin": angles.sin()[None]},
        "attention": {"q": q, "k": k, "v": v, "is_causal": True},
        "softmax": {"x": x, "dim": -1},
        "cross_entropy": {
            "logits": randn(2 * ROWS, 11),
            "target": torch.randint(0, 11, (2 * ROWS,), generator=generator),
        },
    }
    return arguments.get(op)


def other_arguments(op: str, arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a catalogued op may be called with beside its typical ``arguments``, by what is another."""

    def like(name: str, *shape: int, seed: int = 3) -> torch.Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(arguments[name].device)

    def ones(name: str, drop: tuple[int, ...], *shape: int) -> torch.Tensor:
        kept = torch.ones(shape, dtype=torch.bool, device=arguments[name].device)
        kept[..., list(drop)] = False
        return kept

    if op in ("layer_norm", "rms_norm", "add_rms_norm", "linear"):
        other: dict[str, dict[str, Any]] = {"bias": {"bias": None}} if op in ("layer_norm", "linear") else {}
        if op != "linear":
            other["eps"] = {"eps": 0.5}
        if op == "layer_norm":
            other["weight bias"] = {"weight": None, "bias": None}
        elif op != "linear":
            other |= {"offset": {"offset": 1.0}, "weight": {"weight": None}}
        names = ("x", "residual") if op == "add_rms_norm" else ("x",)
        other["shape"] = {name: arguments[name].flatten(0, -2)[:5] for name in names}
        other["shape of four axes"] = {name: arguments[name][:, None].repeat(1, 3, 1, 1) for name in names}
        return other
    if op == "gated_mlp":
        return {
            "activation": {"activation": "gelu"},
            "biases": {"gate_bias": like("x", 48), "up_bias": like("x", 48), "down_bias": like("x", HIDDEN)},
        }
    if op == "rope":
        half = {name: arguments[name][..., : HEAD // 2].contiguous() for name in ("cos", "sin")}
        return {"interleaved": {"interleaved": True}, "width of the tables": half}
    if op == "attention":
        length = arguments["q"].shape[2]
        grouped = {name: arguments[name][:, :2].contiguous() for name in ("k", "v")}
        return {
            "is_causal": {"is_causal": False},
            "mask": {"is_causal": False, "mask": ones("q", (1, 4), 2, 1, 1, length)},
            "added mask": {"is_causal": False, "mask": like("q", 1, 1, length, length)},
            "scale": {"scale": 1.5},
            "heads of k and v": grouped,
            "softcap": {"softcap": 0.8},
            "sinks": {"sinks": like("q", HEADS)},
            "window": {"window": 2},
        }
    if op == "softmax":
        return {"dim": {"dim": 1}}
    if op == "cross_entropy":
        target = arguments["target"].clone()
        target[::3] = 4
        return {
            "ignore_index": {"target": target, "ignore_index": 4},
            "weight": {"weight": like("logits", 11).abs() + 0.1},
            "label_smoothing": {"label_smoothing": 0.3},
            "reduction to a sum": {"reduction": "sum"},
            "no reduction": {"reduction": "none"},
        }
    return {}
