"""Losses that a forward calls: found, proved on labels, and left alone where no example shows a case."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from called_functions import sites
from kpt import ops
from recognised import Call


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
