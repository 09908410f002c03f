"""What kernels are expected to gain, from measured rates and the weights of their sites."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import kpt_plugin_triton.plugin as plugin
from kpt import ops, plugins
from kpt.judge.calls import Call
from kpt.specs import HardwareProfile
from kpt_plugin_triton.skinny_sites import predict_quantised

#: A thousand bytes a second, so that the numbers below can be read.
PROFILE = HardwareProfile("made up", "cuda", bandwidth=1e3)


class Decoder(nn.Module):
    """Two linear layers, of 2048 bytes each in half precision, and an embedding of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 32)
        self.up, self.down = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.words(ids)))  # type: ignore[no-any-return]


def sites(model: nn.Module) -> tuple[ops.Site, ...]:
    found = ops.recognise(model, [Call((torch.tensor([3]),), {})]).of("linear")
    assert len(found) == 2
    return tuple(found)


def call_of(seconds: float, parameter_bytes: int = 0) -> Any:
    return SimpleNamespace(baseline_seconds=seconds, parameter_bytes=parameter_bytes)


def test_quantised_weights_are_expected_to_save_the_time_to_read_a_byte_of_two() -> None:
    found = sites(Decoder().to(torch.bfloat16).eval())
    saved = 2 * 32 * 32 / PROFILE.bandwidth
    assert predict_quantised(call_of(4 * saved), PROFILE, found) == pytest.approx(4 / 3)
    assert predict_quantised(call_of(4 * saved), PROFILE, found[:1]) == pytest.approx(8 / 7)
    assert predict_quantised(call_of(saved / 2), PROFILE, found) == pytest.approx(10.0), "never all of it"


def test_a_weight_that_two_sites_share_is_saved_once() -> None:
    found = sites(Decoder().to(torch.bfloat16).eval())
    assert predict_quantised(call_of(4.0), PROFILE, (found[0], found[0])) == pytest.approx(
        predict_quantised(call_of(4.0), PROFILE, found[:1])
    )


def test_without_a_measured_bandwidth_a_call_reads_the_models_parameters() -> None:
    """Three matrices of the same size, of two of which half is saved: 6 parts become 4."""
    unknown = replace(PROFILE, bandwidth=0.0)
    found = sites(Decoder().to(torch.bfloat16).eval())
    assert predict_quantised(call_of(1.0, 3 * 2048), unknown, found) == pytest.approx(6 / 4)


def test_both_quantised_kernels_are_predicted_so() -> None:
    specs = {spec.name: spec for spec in plugin.kpt_kernels() if spec.op == "linear"}
    for name in ("triton-int8", "triton-fp8"):
        assert plugins.load(specs[name].predict) is predict_quantised
