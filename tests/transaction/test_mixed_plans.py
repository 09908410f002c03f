"""Plans of a compiled, a precision and a kernel variant, through the life of a model as in `test_modes`."""

from __future__ import annotations

import copy

import pytest
import torch

import kpt
import mixed_models
import slow_models
from fingerprints import fallbacks, fast_calls, optimized
from kpt import ops
from kpt.specs import KernelSpec
from mixed_models import Mixed


def mixed(training: bool = False) -> Mixed:
    return mixed_models.mixed(training, rounds=400)


def ready(training: bool = False) -> tuple[Mixed, torch.Tensor]:
    """An optimised model and the example that it was optimised for; all kinds of changes were committed."""
    model, example = mixed(training), torch.randn(64, 64)
    plugins = mixed_models.plugins(mixed_models.CompiledByInductor, training=training)
    optimized(model, example, plugins=plugins, budget=120.0)
    assert mixed_models.phases(model) == mixed_models.EVERY_PHASE, kpt.report(model).rejected
    assert fast_calls(model) == 0
    return model, example


def eager(model: Mixed) -> Mixed:
    """A model without any plan that shares the weights."""
    twin = mixed(model.training)
    twin.load_state_dict(model.state_dict())
    return twin


def agrees(model: torch.nn.Module, twin: torch.nn.Module, example: torch.Tensor) -> None:
    """The layer in bf16 rounds to three digits; a stale weight differs by far more."""
    with torch.no_grad():
        torch.testing.assert_close(model(example), twin(example), rtol=0.05, atol=0.05)


def trains(model: torch.nn.Module, example: torch.Tensor, rate: float = 0.5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model(example).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def moved(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two outputs differ by more than the tolerance of `agrees`."""
    return not torch.allclose(before, after, rtol=0.2, atol=0.2)


def output(model: torch.nn.Module, example: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(example)


def test_evaluation_training_step_evaluation():
    model, example = ready()
    agrees(model, eager(model), example)
    assert fast_calls(model) == 1
    before = output(model, example)
    for _ in range(4):
        trains(model.train(), example)
    assert fallbacks(model)["the model is in training mode"] == 4
    model.eval()
    after = output(model, example)
    assert moved(before, after)
    assert torch.equal(after, output(eager(model), example)), "the copies in bf16 are stale: eager answers"
    fast = fast_calls(model)
    kpt.refresh(model)
    assert mixed_models.phases(model) == mixed_models.EVERY_PHASE
    agrees(model, eager(model), example)
    assert fast_calls(model) == 1 and fast == 2


def test_training_evaluation_training():
    model, example = ready(training=True)
    twin = copy.deepcopy(eager(model))
    generator = torch.Generator().manual_seed(3)
    for number in range(8):
        if number == 4:
            agrees(model.eval(), twin.eval(), example)
            assert fallbacks(model) == {"the model is in evaluation mode": 1}
            model.train(), twin.train()
        batch = torch.randn(64, 64, generator=generator)
        trains(model, batch, 0.05)
        trains(twin, batch, 0.05)
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.01)
    assert fast_calls(model) == 8


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_load_state_dict(assign, training):
    model, example = ready(training)
    before = output(model, example)
    torch.manual_seed(9)
    other = Mixed().train(training)
    model.load_state_dict(other.state_dict(), assign=assign)
    agrees(model, other, example)
    assert moved(before, output(other, example))
    kpt.refresh(model)
    assert mixed_models.phases(model) == mixed_models.EVERY_PHASE
    fast = fast_calls(model)
    if training:
        trains(model, example, 0.01)
        trains(other, example, 0.01)
    agrees(model, other, example)
    assert fast_calls(model) == fast + 1


def test_weights_written_in_place():
    """One layer of each kind: plain, of the layout pass, of the kernel, of the policy, and compiled."""
    model, example = ready()
    for name in ("first", "scale", "norm", "wide", "last"):
        before = output(model, example)
        with torch.no_grad():
            model.get_submodule(name).weight.mul_(-3.0)
        agrees(model, eager(model), example)
        assert moved(before, output(model, example)), name
        kpt.refresh(model)
        assert mixed_models.phases(model) == mixed_models.EVERY_PHASE
        fast = fast_calls(model)
        agrees(model, eager(model), example)
        assert fast_calls(model) == fast + 1, name
        with torch.no_grad():
            model.get_submodule(name).weight.div_(-3.0)
        kpt.refresh(model)


def test_adapters_loaded_and_selected(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> torch.nn.Module:
        base = mixed()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["first"], init_lora_weights=False)
        return peft.get_peft_model(base, config).eval()

    adapted(5).save_pretrained(tmp_path / "second")
    model, plain, example = adapted(1), adapted(1), torch.randn(64, 64)
    plugins = mixed_models.plugins(mixed_models.CompiledByInductor)
    optimized(model, example, plugins=plugins, budget=120.0)
    assert mixed_models.phases(model) == mixed_models.EVERY_PHASE, kpt.report(model).rejected
    agrees(model, plain, example)
    assert fast_calls(model) == 1
    first = output(plain, example)
    for each in (model, plain):
        each.load_adapter(tmp_path / "second", "second")
        each.eval()
    agrees(model, plain, example)
    assert not moved(first, output(model, example))
    for each in (model, plain):
        each.set_adapter("second")
    second = output(plain, example)
    assert moved(first, second)
    agrees(model, plain, example)
    kpt.refresh(model)
    assert mixed_models.phases(model) == mixed_models.EVERY_PHASE, kpt.report(model).rejected
    agrees(model, plain, example)
    assert fast_calls(model) == 1
    with model.disable_adapter(), plain.disable_adapter():
        agrees(model, plain, example)
        assert moved(second, output(model, example))
    agrees(model, plain, example)


def test_recognition_begins_with_the_ops_that_have_a_kernel_here(monkeypatch):
    """Where time is short, sites that nothing would serve are not what it is spent on."""
    asked = []
    original = ops.recognise

    def noted(*given, **options):
        asked.append(options["first"])
        return original(*given, **options)

    monkeypatch.setattr(ops, "recognise", noted)
    elsewhere = KernelSpec(op="softmax", name="elsewhere", entry="slow_kernels:right", hardware=("cuda",))
    plugins = [*mixed_models.plugins(), slow_models.plugin(kernels=[elsewhere])]
    kpt.optimize(mixed_models.mixed(), torch.randn(64, 64), plugins=plugins, budget=5.0, cache=False)
    assert asked == [{"rms_norm"}]
