"""The command line in this process, and a small model file with its architecture."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kpt
import saved_models
from kpt.cli.main import run
from stand_ins import receipt

ARCHITECTURES = "kpt_test_cli_architectures"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


@pytest.fixture
def kpt_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def call(*arguments: object) -> Answer:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def chatty() -> nn.Module:
    """A factory that prints, as many do."""
    print("building the network")
    return Net()


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """(weights, ``--arch``) of a small network."""
    module = types.ModuleType(ARCHITECTURES)
    module.Net, module.chatty = Net, chatty  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ARCHITECTURES, module)
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt", f"{ARCHITECTURES}:chatty"


@pytest.fixture
def architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of ``saved_models.ARCH`` can be imported."""
    monkeypatch.setitem(sys.modules, saved_models.ARCH, saved_models.architectures())


@pytest.fixture
def model() -> saved_models.Small:
    torch.manual_seed(0)
    return saved_models.Small().eval()


@pytest.fixture
def optimized(monkeypatch):
    """Stands in for the transaction: records what it was asked and leaves the model alone."""
    asked: dict[str, object] = {}

    def optimize(model, inputs, **options):
        asked.update(options, inputs=inputs, model=model)
        return model

    def save(model, folder, build=None):
        asked["build"] = build
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps({"build": {"kind": "named", **(build or {})}}))
        (folder / "receipt.json").write_text(receipt().to_json())

    for name, value in (("optimize", optimize), ("report", lambda model: receipt()), ("save", save)):
        monkeypatch.setitem(vars(kpt), name, value)
    return asked
