"""Files of weights: they fill their architecture, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from kpt.modelfiles import ModelFileError, load_model
from kpt.modelfiles.pickles import sha256
from saved_models import ARCH, Holder, Tied, code_of, same

pytestmark = pytest.mark.usefixtures("architectures")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_fills_its_architecture(tmp_path, model, legacy):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(path, arch=f"{ARCH}:Small")
    assert same(loaded.model, model) and not loaded.model.training
    assert (loaded.kind, loaded.sha256, loaded.build) == (
        "state-dict",
        sha256(path),
        {"arch": f"{ARCH}:Small"},
    )


def test_safetensors_fills_its_architecture(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", arch=f"{ARCH}:Small")
    assert loaded.kind == "safetensors" and same(loaded.model, model)


def test_weights_of_a_checkpoint_and_wrapper_prefixes_are_found(tmp_path, model):
    path = tmp_path / "checkpoint.pth"
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "rng_state": torch.get_rng_state(), "state_dict": wrapped}, path)
    said: list[str] = []
    loaded = load_model(path, arch=f"{ARCH}:Small", notice=said.append)
    assert same(loaded.model, model)
    assert any("'state_dict'" in line for line in said) and any("'_orig_mod.'" in line for line in said)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.", "network.inner."]
)
def test_a_prefix_of_every_name_is_left_out_and_told(tmp_path, model, prefix):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        said: list[str] = []
        loaded = load_model(tmp_path / name, arch=f"{ARCH}:Small", notice=said.append)
        assert same(loaded.model, model) and all("left out" in line for line in said) and said


def test_wrappers_inside_of_names_are_left_out(tmp_path, model):
    names = {name: name.replace("first.", "first._orig_mod.") for name in model.state_dict()}
    torch.save({names[name]: value for name, value in model.state_dict().items()}, tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Small", notice=lambda line: None)
    assert same(loaded.model, model)


def test_names_that_the_model_knows_are_kept(tmp_path):
    source, said = Holder(), []
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Holder", notice=said.append)
    assert same(loaded.model, source) and not said
    doubled = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save(doubled, tmp_path / "weights.pt")
    assert same(load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Holder").model, source)


def test_a_tensor_that_is_tied_may_be_stored_once(tmp_path):
    source = Tied()
    save_file({"embed.weight": source.embed.weight.detach()}, tmp_path / "tied.safetensors")
    loaded = load_model(tmp_path / "tied.safetensors", arch=f"{ARCH}:Tied").model
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, source.embed.weight)


@pytest.mark.parametrize(
    ("stored", "arch"), [("bfloat16", "Small"), ("float32", "half"), ("float64", "Small")]
)
def test_the_model_takes_the_dtype_of_the_weights_so_that_nothing_is_rounded(tmp_path, model, stored, arch):
    model = model.to(getattr(torch, stored))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert same(load_model(tmp_path / "model.pt", arch=f"{ARCH}:{arch}").model, model)


def test_weights_that_do_not_fit_are_named(tmp_path, model):
    weights = model.state_dict()
    path = tmp_path / "model.pt"

    def message(content, arch="Small"):
        torch.save(content, path)
        with pytest.raises(ModelFileError) as caught:
            load_model(path, arch=f"{ARCH}:{arch}")
        return caught.value

    less = {name: value for name, value in weights.items() if name != "last.bias"}
    assert message(less).code == "missing-keys" and "last.bias" in str(message(less))
    more = {**weights, "extra.weight": torch.ones(2)}
    assert message(more).code == "unexpected-keys" and "extra.weight" in str(message(more))
    assert message(weights, "Wide").code == "wrong-shapes"
    assert "first.weight is (4, 3), the model has (5, 3)" in str(message(weights, "Wide"))
    integers = {**weights, "last.bias": torch.ones(2, dtype=torch.int8)}
    assert message(integers).code == "wrong-dtypes"
    assert message(weights, "Other").code == "wrong-architecture"
    assert message({"epoch": 3}).code == "no-weights" and "epoch" in str(message({"epoch": 3}))
    assert message([1, 2]).code == "no-weights"


def test_weights_alone_need_an_architecture(tmp_path, model):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert code_of(path) == "needs-arch"
    for arch in (
        "Small",
        "not_there_42:Small",
        f"{ARCH}:Missing",
        f"{ARCH}:broken",
        f"{ARCH}:number",
        f"{ARCH}:text",
    ):
        assert code_of(path, arch=arch) == "bad-arch"
