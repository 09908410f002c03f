"""LoRA added before and after optimisation: loaded, disabled, merged."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

import kpt
import slow_models
from fingerprints import fallbacks, fast_calls, optimized
from kpt.specs import Variant

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


class DirectActivation:
    """Takes the detour out of `SlowActivation`."""

    def propose(self, observation, hardware):
        return [Variant("direct", predicted_gain=3.0, sites=())]

    def apply(self, model, variant):
        changed = [module for module in model.modules() if isinstance(module, SlowActivation)]
        for module in changed:
            module.forward = types.MethodType(lambda self, x: torch.relu(x), module)
        self.applied = len(changed)
        return lambda: [module.__dict__.pop("forward", None) for module in changed]

    def verify_applied(self, model):
        return self.applied > 0


class SlowActivation(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            x = x.neg().neg()
        return torch.relu(x)


def small_encoder() -> torch.nn.Module:
    """A BERT of two layers whose activation has something to gain."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config).eval()
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = SlowActivation()
    return model


def with_adapter(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


# The pass's entry names this module as it is imported by its name.
slow_models.DirectActivation = DirectActivation
DirectActivation.__module__, DirectActivation.__qualname__ = "slow_models", "DirectActivation"
PLUGINS = [slow_models.plugin(DirectActivation)]
IDS = {"input_ids": torch.arange(12).reshape(2, 6)}


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**IDS).last_hidden_state


def test_an_adapter_added_before_is_part_of_what_is_optimised():
    model = with_adapter(small_encoder())
    expected = output(model)
    with model.disable_adapter():
        base = output(model)
    assert not torch.equal(expected, base)
    optimized(model, IDS, plugins=PLUGINS)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    assert fast_calls(model) == 1
    with model.disable_adapter():
        torch.testing.assert_close(output(model), base, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_merging_in_place_and_taking_it_back():
    model = with_adapter(small_encoder())
    expected = output(model)
    optimized(model, IDS, plugins=PLUGINS)
    model.merge_adapter()
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    kpt.refresh(model)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_added_after_is_never_bypassed():
    model = optimized(small_encoder(), IDS, plugins=PLUGINS)
    base = output(model)
    wrapped = with_adapter(model)
    adapted = output(wrapped)
    assert not torch.allclose(adapted, base)
    torch.testing.assert_close(adapted, output(with_adapter(small_encoder())))
    assert any("registered" in reason for reason in fallbacks(model))
    with wrapped.disable_adapter():
        torch.testing.assert_close(output(wrapped), base, rtol=1e-5, atol=1e-6)
    kpt.refresh(model)
    torch.testing.assert_close(output(wrapped), adapted, rtol=1e-5, atol=1e-6)
    assert fast_calls(model) == 1
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(output(merged), adapted, rtol=1e-4, atol=1e-5)


def test_another_adapter_loaded_and_selected():
    model = with_adapter(small_encoder())
    optimized(model, IDS, plugins=PLUGINS)
    first = output(model)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    model.add_adapter("second", config)
    torch.testing.assert_close(output(model), first, rtol=1e-5, atol=1e-6)
    model.set_adapter("second")
    second = output(model)
    kpt.restore(model)
    torch.testing.assert_close(second, output(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, second)


def test_training_an_adapter():
    model, twin = with_adapter(small_encoder()).train(), with_adapter(small_encoder()).train()
    optimized(model, IDS, plugins=PLUGINS)
    optimizers = [
        torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.1) for m in (model, twin)
    ]
    for _ in range(4):
        for trained, optimizer in zip((model, twin), optimizers, strict=True):
            trained(**IDS).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert fast_calls(model) == 4
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
