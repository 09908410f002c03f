"""Training steps under autocast: what stays as it was, what is in bfloat16, and when it is offered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from observing import PROFILE, applied, observe, relative, skips, variants

import kpt
from kpt.specs import HardwareProfile, HardwareSpec, PassSpec, PolicySpec
from kpt_plugin_cpu import plugin
from kpt_plugin_cpu.autocast import Autocast
from kpt_plugin_cpu.inductor import Inductor, compiler
from kpt_plugin_cpu.probe import CpuProbe


class Net(nn.Module):
    """With a dictionary of a float and an integer output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.last(torch.nn.functional.gelu(self.norm(self.first(x))))
        return {"logits": logits, "best": logits.argmax(-1)}


class Products(TorchDispatchMode):
    """The dtypes of what is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.seen.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def training(model: nn.Module, x: torch.Tensor, **facts: Any) -> Any:
    return observe(model.train(), x, mode="training", **facts)


@pytest.mark.parametrize("compiled", [False, True])
def test_products_are_in_bfloat16_and_all_that_is_seen_in_float32(compiled: bool) -> None:
    if compiled and compiler() is None:
        pytest.skip("no C++ compiler")
    model, x = Net(), torch.randn(32, 64)
    (offer,) = variants(Autocast(), training(model, x))
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(x)["logits"].square().mean(), parameters)
    if compiled:
        (live,) = variants(Inductor(), training(model, x))
        _, space, undo_compiled = applied(Inductor, model, live)
        behaviour = Autocast()
        undo = behaviour.apply(space, offer)
    else:
        behaviour, space, undo = applied(Autocast, model, offer)
    output = space.forward(x)
    gradients = torch.autograd.grad(output["logits"].square().mean(), parameters)
    assert output["logits"].dtype is torch.float32 and output["best"].dtype is torch.int64
    assert 1e-4 < relative(output["logits"].detach(), model(x)["logits"].detach()) < 2e-2
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.dtype is torch.float32 and 1e-4 < relative(mine, theirs) < 5e-2
    assert behaviour.verify_applied(space) and not torch.is_autocast_enabled("cpu")
    if not compiled:
        with Products() as products:
            space.forward(x)
        assert products.seen == {torch.bfloat16}
    undo()
    if compiled:
        undo_compiled()
    assert "forward" not in space.__dict__


def test_autocast_is_off_after_a_forward_that_raises() -> None:
    class Raises(Net):
        def forward(self, x: torch.Tensor) -> Any:
            raise ValueError(f"autocast: {torch.is_autocast_enabled('cpu')}")

    model, x = Raises(), torch.randn(4, 64)
    _, space, undo = applied(Autocast, model, variants(Autocast(), training(model, x))[0])
    with pytest.raises(ValueError, match="autocast: True"):
        space.forward(x)
    assert not torch.is_autocast_enabled("cpu")
    undo()


def test_it_is_predicted_by_rates_and_by_what_casting_the_weights_costs() -> None:
    x = torch.randn(4, 64)
    gains = [
        variants(Autocast(), training(Net(), x, parameter_bytes=size), PROFILE)[0].predicted_gain
        for size in (0, 10**7, 10**9)
    ]
    assert gains[0] > gains[1] > 1.0 > gains[2]
    slow = replace(PROFILE, matmul_rates={"float32": 1e11, "bfloat16": 5e10})
    assert variants(Autocast(), training(Net(), x), slow)[0].predicted_gain < 1.0


def test_reasons_to_skip() -> None:
    x = torch.randn(4, 64)
    old = replace(PROFILE, native_dtypes=("float32", "float64"))
    assert "no bfloat16" in skips(Autocast(), training(Net(), x), old)[0]
    assert "no float32" in skips(Autocast(), training(Net().bfloat16(), x.bfloat16()))[0]
    mixed = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8).double())
    assert "float64" in skips(Autocast(), training(mixed, x))[0]
    mixed = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8).bfloat16())
    assert "bfloat16" in skips(Autocast(), training(mixed, x))[0]
    assert variants(Autocast(), training(Net(), x, operations=0.0)), "they may not have been counted"
    mine = ((("cpu", True, torch.bfloat16),), False)
    assert "of your own" in skips(Autocast(), training(Net(), x, ambient=mine))[0]


class Bf16Cpu(CpuProbe):
    """The CPU that runs this, as if it had arithmetic in bfloat16."""

    def detect(self) -> HardwareProfile | str:
        found = super().detect()
        assert isinstance(found, HardwareProfile)
        return replace(found, native_dtypes=(*{*found.native_dtypes, "bfloat16"},))

    def measure(self, profile: HardwareProfile) -> HardwareProfile:
        return replace(profile, bandwidth=PROFILE.bandwidth, matmul_rates=PROFILE.matmul_rates)


class AutocastOnly:
    @kpt.hookimpl
    def kpt_hardware(self) -> Iterator[HardwareSpec]:
        yield HardwareSpec("cpu", "cpu", f"{__name__}:Bf16Cpu")

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield from (spec for spec in plugin.kpt_passes() if spec.name == "autocast")

    @kpt.hookimpl
    def kpt_precision_policies(self) -> Iterator[PolicySpec]:
        yield from plugin.kpt_precision_policies()


class Late(nn.Module):
    """Slow where products are in float32, on every CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.first(x))
        for _ in range(0 if hidden.dtype is torch.bfloat16 else 200):
            hidden = hidden.neg().neg()
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x))


def test_a_training_step_is_proven_kept_follows_its_optimiser_and_is_undone() -> None:
    torch.manual_seed(1)
    model, x = Late().train(), torch.randn(64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kpt.optimize(model, x, plugins=[AutocastOnly()], cache=False, budget=60.0)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["autocast:bfloat16"], receipt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    twin = Late().train()
    twin.load_state_dict(before)
    losses: dict[nn.Module, list[float]] = {model: [], twin: []}
    for module, seen in losses.items():
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(6):
            optimiser.zero_grad()
            loss = (module(x) - 1.0).square().mean()
            loss.backward()
            optimiser.step()
            seen.append(loss.item())
    assert losses[model] == pytest.approx(losses[twin], rel=0.02) and losses[model] != losses[twin]
    assert losses[model][-1] < 0.9 * losses[model][0]
    assert kpt.report(model).calls["optimized"] == 6
    with torch.autocast("cpu", torch.bfloat16):  # another arithmetic than it was optimised for
        assert model(x).dtype is torch.bfloat16
    assert kpt.report(model).calls["fallback"] == 1
    kpt.restore(model)
    assert torch.equal(model(x), _twin(model)(x))


def _twin(model: nn.Module) -> nn.Module:
    twin = type(model)().train()
    twin.load_state_dict(model.state_dict())
    return twin


class Checkpointed(Late):
    """Its first part is run again in the backward pass; a batch norm, and a pass without gradients before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            guess = torch.nn.functional.gelu(self.first(x))
        hidden = self.norm(super().hidden(x)) + guess
        return self.last(checkpoint(torch.nn.functional.gelu, hidden, use_reentrant=False))


@pytest.mark.parametrize("kind", [Late, Checkpointed])
def test_steps_inside_an_autocast_that_is_off_see_each_weight_as_it_is(kind: type[Late]) -> None:
    """Gradients of two batches are summed; the weights cast in a step are not those of the next."""
    torch.manual_seed(1)
    model, x = kind().train(), torch.randn(64, 64)
    twin = kind().train()
    twin.load_state_dict(model.state_dict())
    kpt.optimize(model, x, plugins=[AutocastOnly()], cache=False, budget=60.0)
    assert kpt.report(model).accepted, kpt.report(model)
    with torch.autocast("cpu", enabled=False):
        seen = [_losses(module, x) for module in (model, twin)]
    assert seen[0] == pytest.approx(seen[1], rel=0.02) and seen[0] != seen[1]
    assert kpt.report(model).calls["optimized"] == 12
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02, msg=name)
    kpt.restore(model)


def _losses(module: nn.Module, x: torch.Tensor) -> list[float]:
    optimiser, seen = torch.optim.SGD(module.parameters(), lr=0.1), []
    for _ in range(6):
        optimiser.zero_grad()
        for part in (x, x.flip(0) * 0.5):
            loss = (module(part) - 1.0).square().mean()
            loss.backward()
        optimiser.step()
        seen.append(loss.item())
    return seen


def test_gradients_of_gradients_are_eagers() -> None:
    torch.manual_seed(1)
    model, x = Late().train(), torch.randn(64, 64)
    kpt.optimize(model, x, plugins=[AutocastOnly()], cache=False, budget=60.0)
    assert kpt.report(model).accepted
    found = []
    for module in (model, _twin(model)):
        weights = list(module.parameters())
        first = torch.autograd.grad(module(x).square().mean(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        found.append(torch.cat([gradient.flatten() for gradient in second]))
    assert kpt.report(model).calls["optimized"] == 1 and relative(*found) < 0.05
    kpt.restore(model)


def test_exact_offers_none_of_it() -> None:
    model, x = Late().train(), torch.randn(64, 64)
    kpt.optimize(model, x, plugins=[AutocastOnly()], level="exact", cache=False, budget=30.0)
    assert not kpt.report(model).optimized
