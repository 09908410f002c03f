"""The models of benchmarks/cpu_models.py: how each is built, and fresh inputs for its n-th call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Call = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model, ``fresh(n)`` for the inputs of its n-th call, and which of their sizes vary."""

    title: str
    model: torch.nn.Module
    fresh: Callable[[int], Call]
    dynamic_shapes: dict[str, dict[int, str]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def _generator(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def bert_base() -> Subject:
    from transformers import BertConfig, BertModel

    def fresh(n: int) -> Call:
        ids = torch.randint(1000, 30000, (1, 128), generator=_generator(n))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Subject("BERT-base, 1×128, mask of ones, random weights", BertModel(BertConfig()), fresh)


def _images(batch: int) -> Callable[[int], Call]:
    return lambda n: {"pixel_values": torch.randn(batch, 3, 224, 224, generator=_generator(n))}


def resnet50() -> Subject:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    return Subject("ResNet-50, 1×3×224×224, random weights", model, _images(1))


def vit_small() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return Subject("ViT-small/16, 4×3×224×224, random weights", ViTForImageClassification(config), _images(4))


def encoder() -> Subject:
    from trained_models import sentence_encoder, sentences

    model, tokenizer = sentence_encoder()
    texts = sentences()

    def fresh(n: int) -> Call:
        chosen = torch.randperm(len(texts), generator=_generator(n))[:8].tolist()
        return dict(tokenizer([texts[index] for index in chosen], padding=True, return_tensors="pt"))

    names = ("input_ids", "attention_mask", "token_type_ids")
    return Subject(
        "all-MiniLM-L6-v2 (trained), 8 ragged sentences, padded to the longest",
        model,
        fresh,
        {name: {0: "batch", 1: "sequence"} for name in names},
    )


def smollm2() -> Subject:
    import trained_models

    model, tokenizer = trained_models.smollm2()
    model.config.use_cache = False
    tokens = tokenizer(trained_models.passage(), return_tensors="pt")["input_ids"]

    def fresh(n: int) -> Call:
        start = int(torch.randint(0, tokens.shape[1] - 128, (), generator=_generator(n)))
        return {"input_ids": tokens[:, start : start + 128].clone()}

    return Subject("SmolLM2-135M (trained), prefill 1×128, all logits, no cache", model, fresh)


class Perceptron(torch.nn.Module):
    """784-256-10 with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 10] for ``x`` [batch, 784]."""
        return self.layers(x)


def mlp() -> Subject:
    return Subject(
        "MLP 784-256-10, batch 32, random weights",
        Perceptron(),
        lambda n: {"x": torch.randn(32, 784, generator=_generator(n))},
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "bert-base": bert_base,
    "resnet50": resnet50,
    "vit-small": vit_small,
    "encoder": encoder,
    "smollm2": smollm2,
    "mlp": mlp,
}


def build(name: str) -> Subject:
    """The subject in eval mode, with the same weights each time."""
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    subject.model.eval()
    return subject
