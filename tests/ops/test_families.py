"""Recognition across the families of transformers: nothing missed by kind, nothing replaced wrongly."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from kpt import ops
from model_families import FAMILIES, sample


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def _seed() -> str:
    """The commit, so that each one tests another sample, and a failing one can be repeated."""
    if "KPT_TEST_SEED" in os.environ:
        return os.environ["KPT_TEST_SEED"]
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "0"


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def check(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build(), family.example_inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = ops.recognise(model, [Call((), inputs)])
    ran = {site.path for site in found.sites} | {where.partition(":")[0] for where, _ in found.left_alone}
    norms = {
        path
        for path, module in model.named_modules()
        if re.fullmatch(r".*(RMSNorm|LayerNorm)", type(module).__name__) and path in ran
    }
    proved = {site.path for site in found.sites if site.op in ("rms_norm", "layer_norm")}
    assert norms <= proved, {path: dict(found.left_alone).get(path) for path in norms - proved}
    with torch.no_grad():
        expected = list(tensors(dict(model(**inputs))))
        undos = [ops.install(model, site, ops.reference(site.op)) for site in found.sites]
        replaced = list(tensors(dict(model(**inputs))))
        for undo in reversed(undos):
            undo()
        again = list(tensors(dict(model(**inputs))))
    for one, other, restored in zip(replaced, expected, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
        assert torch.equal(restored, other)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", [family.name for family in sample(8, _seed())])
def test_a_sample_of_families(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family(name: str) -> None:
    check(name)


#: What the ordinary spelling of each family has to give, by op and kind.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"rms_norm", "gated_mlp", "rope", "attention", "linear"}),
        ("gemma", {"rms_norm", "gated_mlp", "rope", "attention", "linear"}),
        ("phi3", {"rms_norm", "gated_mlp", "rope", "attention", "linear"}),
        ("modernbert", {"layer_norm", "gated_mlp", "rope", "attention", "linear"}),
        ("t5", {"rms_norm", "attention", "linear"}),
        ("convnext", {"layer_norm", "linear"}),
        ("mixtral", {"rms_norm", "rope", "attention", "softmax", "linear"}),
        ("whisper", {"layer_norm", "attention", "linear"}),
    ],
)
def test_the_ops_of_a_family(name: str, expected: set[str]) -> None:
    family = FAMILIES[name]
    found = ops.recognise(family.build(), [Call((), family.example_inputs())])
    assert {site.op for site in found.sites} == expected
