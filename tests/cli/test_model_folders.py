"""Model folders: the adapter that knows one loads it, and what it executes needs trust."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kpt.modelfiles import ModelFileError, load_model
from kpt.modelfiles.pickles import sha256
from saved_models import ARCH, Other, Small

pytestmark = pytest.mark.usefixtures("architectures")


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A model folder of an imaginary library, which has files that run code when they are loaded."""
    path = tmp_path / "library-model"
    path.mkdir()
    (path / "config.json").write_text('{"library": "imaginary"}')
    (path / "code.py").write_text("raise SystemExit('it ran')")
    torch.save(model, path / "whole.bin")
    return path


class Adapter:
    """Loads what ``model`` is set to; a test sets what is executed and what is raised."""

    model: nn.Module | None = None
    executed: tuple[str, ...] = ()
    error: BaseException | None = None
    trusted: list[bool] = []

    def executes(self, folder):
        return type(self).executed

    def load(self, folder, *, trust):
        type(self).trusted.append(trust)
        if type(self).error is not None:
            raise type(self).error
        return type(self).model


def plugins(*adapters: type):
    """A registry with these adapters, in this order."""
    import kpt
    from kpt.plugins import registry
    from kpt.specs import AdapterSpec

    for number, adapter in enumerate(adapters):
        setattr(sys.modules[ARCH], f"Adapter{number}", adapter)

    class Plugin:
        @kpt.hookimpl
        def kpt_model_adapters(self):
            for number, _ in enumerate(adapters):
                yield AdapterSpec(f"adapter-{number}", f"{ARCH}:Adapter{number}", "imaginary")

    return registry([Plugin()])


def adapter(**facts) -> type:
    return type("Made", (Adapter,), {"trusted": [], **facts})


def test_the_first_adapter_that_knows_a_folder_loads_it(folder, model):
    model.train()
    unknowing, knowing, later = adapter(), adapter(model=model), adapter(model=Other())
    loaded = load_model(folder, registry=plugins(unknowing, knowing, later))
    assert loaded.model is model and not model.training
    assert (loaded.kind, loaded.build) == ("folder", {"folder": str(folder)})
    assert (unknowing.trusted, knowing.trusted, later.trusted) == ([False], [False], [])


def test_an_adapter_that_breaks_is_told_of_and_the_next_one_is_asked(folder, model):
    said: list[str] = []
    broken_ones = (
        adapter(error=SystemExit("no")),
        adapter(model="a string"),
        type("Bad", (), {"__init__": lambda self: 1 / 0}),
    )
    loaded = load_model(folder, registry=plugins(*broken_ones, adapter(model=model)), notice=said.append)
    assert loaded.model is model
    text = "\n".join(said)
    assert "SystemExit: no" in text and "returned a str" in text and "ZeroDivisionError" in text
    with pytest.raises(ModelFileError, match="SystemExit: no") as caught:
        load_model(folder, registry=plugins(broken_ones[0]), notice=said.append)
    assert caught.value.code == "adapter-failed"


def test_what_an_adapter_says_of_its_own_folder_reaches_the_user(folder):
    from kpt.specs import AdapterError

    failing = adapter(error=AdapterError("missing-keys", "It lacks a.weight.", "Download it again."))
    never = adapter(model=Small())
    with pytest.raises(ModelFileError) as caught:
        load_model(folder, registry=plugins(failing, never))
    error = caught.value
    assert (error.code, error.message, error.hint) == (
        "missing-keys",
        "It lacks a.weight.",
        "Download it again.",
    )
    assert never.trusted == []


def test_what_a_folder_executes_needs_trust_and_is_announced(folder, model):
    executing = adapter(model=model, executed=("code.py", "whole.bin", "a kernel from elsewhere"))
    with pytest.raises(ModelFileError, match="code.py, whole.bin, a kernel") as caught:
        load_model(folder, registry=plugins(executing))
    assert caught.value.code == "untrusted" and "--trust-model" in caught.value.hint
    assert executing.trusted == [], "nothing was loaded"
    said: list[str] = []
    load_model(folder, registry=plugins(executing), trust=True, notice=said.append)
    assert executing.trusted == [True]
    text = "\n".join(said)
    assert sha256(folder / "code.py") in text and "a kernel from elsewhere" in text
    assert sha256(folder / "whole.bin") in text and "torch.nn.modules.linear.Linear" in text


def test_a_folder_without_its_plugin_names_the_command_that_installs_it(folder, monkeypatch):
    from kpt.plugins import Registry
    from kpt.plugins.status import PluginStatus

    def error(*statuses):
        with pytest.raises(ModelFileError) as caught:
            load_model(folder, registry=Registry(statuses, {}))
        assert caught.value.code == "missing-plugin" and str(folder) in caught.value.message
        return caught.value

    assert "pip install kpt-plugin-huggingface" in error().hint
    disabled = PluginStatus("huggingface", "kpt-plugin-huggingface", "1", "disabled", "not named", "name it")
    found = error(disabled)
    assert "disabled: not named" in found.message and "name it" in found.hint
    with pytest.raises(ModelFileError, match="no plugin knows"):
        load_model(folder.parent, registry=Registry([], {}))
