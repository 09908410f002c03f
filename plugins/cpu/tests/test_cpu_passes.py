"""Channels last and the number of threads: values, observable effect, undo."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from observing import PROFILE, applied, observe, relative, skips, variants

from kpt.compiling import CompiledForward
from kpt_plugin_cpu.channels_last import ChannelsLast
from kpt_plugin_cpu.threads import Threads


@torch.no_grad()
def test_channels_last_reaches_the_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    (offer,) = variants(ChannelsLast(), observe(model, x))
    behaviour, space, undo = applied(ChannelsLast, model, offer)
    inside = []
    space[2].register_forward_hook(lambda module, given, output: inside.append(output))
    output = space.forward(x)
    assert inside[0].is_contiguous(memory_format=torch.channels_last)
    assert output.stride() == model(x).stride()
    assert output.view(-1).shape == (output.numel(),)
    assert relative(output, model(x)) < 1e-6
    innermost = x.contiguous(memory_format=torch.channels_last)
    assert space.forward(innermost).stride() == model(innermost).stride()
    assert behaviour.verify_applied(space)
    assert model[0].weight.is_contiguous()
    before = model[0].weight
    undo()
    assert space[0].weight is before and "forward" not in space.__dict__
    assert skips(ChannelsLast(), observe(nn.Linear(2, 2), torch.randn(2, 2)))


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_keep_their_layout(norm) -> None:
    """Assigning them raised, or went unseen behind the property of a parametrisation."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(nn.Conv2d(8, 8, 3))).eval()
    x = torch.randn(2, 3, 8, 8)
    model(x)
    (offer,) = variants(ChannelsLast(), observe(model, x))
    behaviour, space, undo = applied(ChannelsLast, model, offer)
    assert relative(space.forward(x), model(x)) < 1e-6
    assert behaviour.weights == 1 and "weight" not in space[1]._parameters
    undo()
    assert space[0].weight is model[0].weight and "weight" not in space[1]._parameters


@dataclass
class Found:
    boxes: torch.Tensor
    maps: list[torch.Tensor]


class Pairs(nn.Module):
    """Takes two images in a tuple, and returns what it finds in a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, images: tuple[torch.Tensor, torch.Tensor]) -> Found:
        hidden = [self.second(self.first(image).relu()) for image in images]
        return Found(hidden[0].flatten(2), hidden)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_channels_last_converts_and_gives_back_what_lies_deeper(compiled: bool):
    model = Pairs().eval()
    images = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 12, 12)
    (offer,) = variants(ChannelsLast(), observe(model, ((images,),)))
    _, space, undo = applied(ChannelsLast, model, offer)
    inside = []
    if not compiled:
        space.first.register_forward_pre_hook(lambda module, given: inside.append(given[0]))
    forward = CompiledForward(space.forward, backend="eager") if compiled else space.forward
    found, true = forward(images), model(images)
    assert type(found) is Found
    for mine, theirs in zip((found.boxes, *found.maps), (true.boxes, *true.maps), strict=True):
        assert mine.stride() == theirs.stride() and relative(mine, theirs) < 1e-6
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in inside)
    assert compiled or len(inside) == 2
    if compiled:
        forward.dispose()
    undo()


def test_threads_are_set_during_the_call_and_put_back(mlp):
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    seen = []
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    observation = observe(model, torch.randn(2, 4), baseline_seconds=1e-4)
    from kpt.specs import Variant

    behaviour = Threads()
    undo = behaviour.apply(model, Variant("other", {"threads": other}))
    model.forward(torch.randn(2, 4))
    assert seen == [other]
    assert torch.get_num_threads() == before
    assert behaviour.verify_applied(model)
    undo()
    crowded = replace(PROFILE, compute_units=max(before, 1))
    assert skips(Threads(), replace(observation, baseline_seconds=1.0), crowded)
