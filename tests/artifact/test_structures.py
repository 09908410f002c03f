"""A model is built again by the name of its class, or, with trust, from a pickle of its structure."""

from __future__ import annotations

import functools
import json
import sys
import types

import pytest
import torch

import kpt
from artifacts import Linear, in_module, unoptimised
from kpt.artifact import ArtifactError

pytest.importorskip("safetensors")


@pytest.mark.parametrize("change", ["attribute", "hidden buffer", "function", "object", "tensor"])
def test_what_the_constructor_does_not_set_is_kept_in_a_pickle_of_the_structure(
    tmp_path, monkeypatch, change
):
    class Changed(Linear):
        def __init__(self):
            super().__init__()
            self.factor = 1.0
            self.activation = torch.relu
            self.settings = types.SimpleNamespace(shift=0.0)
            self.scale = torch.ones(8)
            self.register_buffer("offset", torch.zeros(8), persistent=False)

        def forward(self, x):
            x = self.activation(self.linear(x)) * self.factor + self.offset
            return x * self.scale + self.settings.shift

    model = in_module(monkeypatch, Changed)()
    assert json.loads((unoptimised(model, tmp_path / "as-built") / "recipe.json").read_text())["build"] == {
        "kind": "class",
        "arch": "kpt_test_artifact_home:Odd",
    }
    match change:
        case "attribute":
            model.factor = 2.5
        case "hidden buffer":
            model.offset.fill_(3.0)
        case "function":
            model.activation = torch.tanh
        case "object":
            model.settings.shift = 3.0
        case "tensor":
            model.scale = torch.full((8,), 3.0)
    path = unoptimised(model, tmp_path / "changed")
    with pytest.raises(ArtifactError, match="pickle"):
        kpt.load(path, plugins=[])
    x = torch.randn(4, 8)
    assert torch.equal(kpt.load(path, trust=True, plugins=[])(x), model(x))


def test_a_class_whose_constructor_makes_functions_is_built_by_its_name(tmp_path, monkeypatch):
    class Doubles(Linear):
        def __init__(self):
            super().__init__()
            factor = 2.0
            self.activation = lambda x: x * factor
            self.method = self.double
            self.partial = functools.partial(torch.mul, other=factor)

        def double(self, x):
            return x * 2

        def forward(self, x):
            return self.partial(self.method(self.activation(self.linear(x))))

    model = in_module(monkeypatch, Doubles)()
    path = unoptimised(model, tmp_path / "artifact")
    assert json.loads((path / "recipe.json").read_text())["build"]["kind"] == "class"
    x = torch.randn(4, 8)
    assert torch.equal(kpt.load(path, plugins=[])(x), model(x))


def test_a_structure_whose_classes_are_gone_is_an_error_of_the_artifact(tmp_path, monkeypatch):
    class Configured(Linear):
        def __init__(self, width):
            super().__init__()

        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Configured)
    path = unoptimised(Configured(3), tmp_path / "artifact")
    monkeypatch.delitem(sys.modules, "kpt_test_artifact_home")
    with pytest.raises(ArtifactError, match="cannot be unpickled: ModuleNotFoundError") as caught:
        kpt.load(path, trust=True)
    assert caught.value.code == "not-buildable" and "arch=" in caught.value.hint
    with pytest.raises(ArtifactError, match="No module named") as caught:
        kpt.load(path, arch="kpt_test_artifact_home:Odd")
    assert caught.value.code == "bad-arch"


def test_a_class_of_a_script_is_saved_with_a_warning(tmp_path, monkeypatch):
    class Scripted(Linear):
        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Scripted).__module__ = "__main__"
    monkeypatch.setattr(sys.modules["__main__"], "Odd", Scripted, raising=False)
    with pytest.warns(UserWarning, match="defined in a script"):
        path = unoptimised(Scripted(), tmp_path / "artifact")
    kpt.load(path, trust=True, plugins=[])


def test_state_that_is_no_tensor_is_named_before_anything_is_written(tmp_path, monkeypatch):
    class Extra(Linear):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            pass

        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Extra)
    with pytest.raises(ArtifactError, match="_extra_state.*dict") as caught:
        unoptimised(Extra(), tmp_path / "artifact")
    assert caught.value.code == "extra-state" and caught.value.hint
    assert not list(tmp_path.glob("*artifact*"))


def test_a_buffer_without_strides_is_named_before_anything_is_written(tmp_path, monkeypatch):
    class Sparse(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("matrix", torch.eye(8).to_sparse())

        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Sparse)
    with pytest.raises(ArtifactError, match="matrix.*sparse_coo") as caught:
        unoptimised(Sparse(), tmp_path / "artifact")
    assert caught.value.code == "extra-state"
    assert not list(tmp_path.glob("*artifact*"))
