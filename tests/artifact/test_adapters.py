"""What a library's adapter says of its model's building is kept, and what breaks in it is told."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
from artifacts import load
from kpt.artifact import ArtifactError
from kpt.specs import AdapterError, AdapterSpec
from slow_models import DirectScale, Net, net, plugin

pytest.importorskip("safetensors")


class Library:
    """An adapter for `Net`. A test sets ``error``, which everything that is asked of it raises."""

    error: BaseException | None = None
    broken: tuple[str, ...] = ()

    def _maybe(self, name: str) -> None:
        if name in Library.broken and Library.error is not None:
            raise Library.error

    def matches(self, model: torch.nn.Module) -> bool:
        self._maybe("matches")
        return type(model) is Net

    def describe(self, model: torch.nn.Module, folder: str) -> dict[str, Any]:
        self._maybe("describe")
        Path(folder, "config.json").write_text('{"net": true}')
        return {"layers": [1, 2]}

    def build(self, description: dict[str, Any], folder: str) -> torch.nn.Module:
        self._maybe("build")
        assert description == {"layers": [1, 2]} and Path(folder, "config.json").is_file()
        return Net().train()


class Adapted:
    """A plugin that makes `Net` faster and knows how it is built."""

    def __init__(self) -> None:
        self.kpt_passes = plugin(DirectScale).kpt_passes

    @kpt.hookimpl
    def kpt_model_adapters(self) -> list[AdapterSpec]:
        return [AdapterSpec("net-library", "kpt_test_library:Library", "kpt_test_library")]


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Adapted:
    module = types.ModuleType("kpt_test_library")
    module.Library = Library  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Library, "error", None)
    monkeypatch.setattr(Library, "broken", ())
    return Adapted()


def saved_by(adapted: Adapted, tmp_path: Path) -> tuple[Path, torch.nn.Module, torch.Tensor]:
    model, x = net(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[adapted], budget=20)
    return kpt.save(model, tmp_path / "artifact"), model, x


def test_a_librarys_adapter_builds_its_model_again(tmp_path: Path, adapted: Adapted) -> None:
    path, model, x = saved_by(adapted, tmp_path)
    manifest = json.loads((path / "recipe.json").read_text())
    assert manifest["build"] == {
        "kind": "adapter",
        "adapter": "net-library",
        "description": {"layers": [1, 2]},
    }
    assert "config.json" in manifest["files"], "what the adapter wrote has a checksum"
    again = kpt.load(path, plugins=[adapted])
    with torch.no_grad():
        assert not again.training and torch.equal(again(x), model(x))


@pytest.mark.parametrize("broken", ["matches", "describe"])
def test_an_adapter_that_breaks_while_saving_is_told_of(
    tmp_path: Path, adapted: Adapted, broken: str
) -> None:
    Library.error, Library.broken = SystemExit("no"), (broken,)
    with pytest.warns(UserWarning, match="SystemExit: no"):
        path, _, _ = saved_by(adapted, tmp_path)
    assert json.loads((path / "recipe.json").read_text())["build"]["kind"] == "class"


class Clumsy(Library):
    """Describes as a test says, after it has written a file of a name that the core's have."""

    answer: Any = None
    file = "config.json"

    def describe(self, model: torch.nn.Module, folder: str) -> Any:
        Path(folder, Clumsy.file).write_text("gone")
        return Clumsy.answer


@pytest.mark.parametrize(
    ("answer", "file", "says"),
    [
        (5, "config.json", "returned int; expected a mapping or None"),
        ({"net": object()}, "config.json", "not JSON serializable"),
        ({}, "model.safetensors", "wrote model.safetensors"),
        ({}, "recipe.json", "wrote recipe.json"),
        (None, "config.json", ""),
    ],
)
def test_an_adapter_that_describes_nothing_usable_leaves_nothing_in_the_artifact(
    tmp_path: Path, adapted: Adapted, monkeypatch: pytest.MonkeyPatch, answer: Any, file: str, says: str
) -> None:
    monkeypatch.setattr(sys.modules["kpt_test_library"], "Library", Clumsy)
    monkeypatch.setattr(Clumsy, "answer", answer)
    monkeypatch.setattr(Clumsy, "file", file)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path, model, x = saved_by(adapted, tmp_path)
    assert not says or any(says in str(warning.message) for warning in said)
    assert json.loads((path / "recipe.json").read_text())["build"]["kind"] == "class"
    assert sorted(entry.name for entry in path.iterdir()) == [
        *("model.safetensors", "receipt.json", "recipe.json", "verify")
    ]
    again = kpt.load(path, plugins=[adapted], trust=True)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_an_adapter_whose_answer_is_no_bool_is_told_of(
    tmp_path: Path, adapted: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "matches", lambda self, model: torch.ones(2))
    with pytest.warns(UserWarning, match="its matches returned Tensor, no bool"):
        path, _, _ = saved_by(adapted, tmp_path)
    assert json.loads((path / "recipe.json").read_text())["build"]["kind"] == "class"


@pytest.mark.parametrize(
    ("error", "code"),
    [(AdapterError("too-old", "It is too old.", "Upgrade."), "too-old"), (KeyError("x"), "not-buildable")],
)
def test_an_adapter_that_cannot_build_says_why(
    tmp_path: Path, adapted: Adapted, error: BaseException, code: str
) -> None:
    path, _, _ = saved_by(adapted, tmp_path)
    Library.error, Library.broken = error, ("build",)
    with pytest.raises(ArtifactError) as caught:
        kpt.load(path, plugins=[adapted])
    assert caught.value.code == code and caught.value.hint
    assert isinstance(kpt.load(path, plugins=[adapted], model=Net()), Net)


def test_an_adapter_that_is_missing_is_named(tmp_path: Path, adapted: Adapted) -> None:
    path, _, _ = saved_by(adapted, tmp_path)
    with pytest.raises(ArtifactError, match="'net-library'") as caught:
        load(path)
    assert caught.value.code == "missing-plugin" and "model=" in caught.value.hint
