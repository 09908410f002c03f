"""What is damaged, foreign or executable is refused, and nothing is lost."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
import slow_models
from artifacts import Linear, edit, in_module, load, unoptimised
from kpt.artifact import ArtifactError
from kpt.artifact import folder as layout
from slow_models import Net, net

pytest.importorskip("safetensors")


def test_a_disk_that_is_full_is_an_error_of_the_system_and_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = kpt.optimize(torch.nn.Linear(64, 64).eval(), torch.randn(2, 64), plugins=[], cache=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))  # files that grow beyond cannot be written
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: .*File too large"):
            kpt.save(model, tmp_path / "artifact")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*artifact*"))


@pytest.mark.parametrize("name", ["safetensors", "numpy"])
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = kpt.optimize(torch.nn.Linear(2, 2).eval(), torch.randn(2, 2), plugins=[], cache=False)
    monkeypatch.setattr(
        layout, "find_spec", lambda wanted: None if wanted == name else importlib.util.find_spec(wanted)
    )
    for attempt in (lambda: kpt.save(model, tmp_path / "other"), lambda: load(artifact)):
        with pytest.raises(ArtifactError, match=f"pip install {name}") as caught:
            attempt()
        assert caught.value.code == "missing-package"
    assert not list(tmp_path.glob("*other*"))


def test_a_model_in_another_state_is_unchanged_by_a_failed_load(artifact: Path) -> None:
    edit(artifact, lambda data: data["aliases"].update(more="nothing"))
    mine = slow_models.Net()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="tied to nothing"):
        load(artifact, model=mine)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("file", ["model.safetensors", "verify/inputs.safetensors", "receipt.json"])
def test_a_file_whose_checksum_differs_is_refused(artifact: Path, file: str) -> None:
    raw = bytearray((artifact / file).read_bytes())
    raw[-1] ^= 1
    (artifact / file).write_bytes(raw)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load(artifact)


def test_a_missing_file_is_named(artifact: Path) -> None:
    (artifact / "verify" / "original.safetensors").unlink()
    with pytest.raises(ArtifactError, match="original.safetensors is missing"):
        load(artifact)


def test_outputs_that_are_not_those_that_were_saved_are_refused(artifact: Path) -> None:
    from safetensors.torch import load_file, save_file

    from kpt.artifact.folder import sha256

    file = artifact / "verify" / "original.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(str(file)).items()}, str(file))
    edit(artifact, lambda data: data["files"].update({"verify/original.safetensors": sha256(file)}))
    with pytest.raises(ArtifactError) as caught:
        load(artifact)
    assert caught.value.code == "verify"


def test_another_schema_version_is_refused(artifact: Path) -> None:
    edit(artifact, lambda data: data.update(schema=99))
    with pytest.raises(ArtifactError, match="schema 99"):
        load(artifact)


def test_another_architecture_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="do not fit Linear"):
        load(artifact, model=torch.nn.Linear(2, 2))


def test_a_path_outside_of_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    edit(artifact, lambda data: data["files"].update({"../elsewhere": "0"}))
    with pytest.raises(ArtifactError, match="outside of the folder"):
        load(artifact)


def test_a_model_of_another_dtype_is_refused_and_keeps_parameters_values_and_modes(artifact: Path) -> None:
    mine = slow_models.Net().double().train()
    mine.norm.eval()
    held = dict(mine.named_parameters())
    with pytest.raises(ArtifactError, match="stored as torch.float32") as caught:
        load(artifact, model=mine)
    assert caught.value.code == "wrong-dtype"
    assert all(p is held[name] and p.dtype == torch.float64 for name, p in mine.named_parameters())
    assert mine.training and mine.first.training and not mine.norm.training


def test_a_load_that_fails_late_restores_the_modes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.artifact import verification

    mine = slow_models.Net().train()
    mine.norm.eval()

    def fails(*args: Any) -> None:
        raise ArtifactError("verify", "no")

    monkeypatch.setattr(verification, "check", fails)
    with pytest.raises(ArtifactError):
        load(artifact, model=mine)
    assert mine.training and mine.first.training and not mine.norm.training


CALLED: list[int] = []


def tempting() -> Net:
    CALLED.append(1)
    return net()


@pytest.mark.parametrize("arch", ["os:abort", f"{__name__}:tempting", "slow_models:net", "absent_module:Net"])
def test_nothing_but_a_known_class_of_modules_is_called_without_trust(artifact: Path, arch: str) -> None:
    edit(artifact, lambda data: data.update(build={"kind": "named", "arch": arch}))
    with pytest.raises(ArtifactError) as caught:
        load(artifact)
    assert caught.value.code == "untrusted" and not CALLED


@pytest.mark.parametrize("kind", ["indices", "mask", "complex"])
def test_outputs_that_are_no_floats_are_verified_too(tmp_path, monkeypatch, kind):
    class Odd(Linear):
        def forward(self, x):
            y = self.linear(x)
            return {"indices": y.argmax(-1), "mask": y > 0, "complex": torch.complex(y, y)}[kind]

    model = in_module(monkeypatch, Odd)()
    path = unoptimised(model, tmp_path / "artifact")
    kpt.load(path, plugins=[])
    weights = {"linear.weight": -model.linear.weight.detach(), "linear.bias": -model.linear.bias.detach()}
    replace(path, "model.safetensors", weights)
    with pytest.raises(ArtifactError, match="differs from verify/original"):
        kpt.load(path, plugins=[])


def replace(path: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of the artifact anew, with its checksum."""
    from safetensors.torch import save_file

    from kpt.artifact.folder import sha256

    save_file(tensors, str(path / name))
    edit(path, lambda data: data["files"].update({name: sha256(path / name)}))


@pytest.mark.parametrize(
    "change",
    [
        *(
            {key: value}
            for key in ("plan", "build", "aliases", "request", "verify")
            for value in ("x", 7, [1])
        ),
        {"aliases": {"linear.weight": 7}},
        {"request": {"level": "exact"}},
        {"request": {"level": "fast", "objective": "latency"}},
        {"request": {"level": "exact", "objective": "latency", "dynamic_shapes": {"x": 7}}},
        {"request": {"level": "exact", "objective": "latency", "dynamic_shapes": [1]}},
        {"aliases": {"linear.weight": {}}},
        *(
            {"request": {"level": "production", "objective": "latency", "dynamic_shapes": shapes}}
            for shapes in ({"absent": {"0": "b"}}, {"x": {"0": []}}, {"x": {"0": ["b", "1", 8]}})
        ),
        {"frozen": 7},
        {"plan": {"steps": "x"}},
        {"plan": {"steps": [7]}},
        {"verify": {"leaves": 7}},
        {"build": {"kind": 7}},
    ],
)
def test_a_manifest_that_says_something_else_is_an_error_of_the_artifact(artifact, change):
    edit(artifact, lambda data: data.update(change))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = load(artifact)
        except ArtifactError as error:
            assert error.hint
            return
    assert not kpt.report(model).optimized
    assert any("does not hold here" in str(warning.message) for warning in said)


@pytest.mark.parametrize("key", ["plan", "build", "aliases", "training", "request", "verify", "files"])
def test_a_manifest_that_lacks_an_entry_is_an_error_of_the_artifact(artifact, key):
    edit(artifact, lambda data: data.pop(key))
    with pytest.raises(ArtifactError, match=f"nothing as '{key}'"):
        load(artifact)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
@pytest.mark.parametrize("name", ["model.safetensors", "verify/inputs.safetensors", "receipt.json"])
def test_files_that_are_none_although_their_checksum_is_right(tmp_path, monkeypatch, name, content):
    from kpt.artifact.folder import sha256

    class Plain(Linear):
        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Plain)
    path = unoptimised(Plain(), tmp_path / "artifact")
    (path / name).write_bytes(content)
    edit(path, lambda data: data["files"].update({name: sha256(path / name)}))
    with pytest.raises(ArtifactError) as caught:
        kpt.load(path, plugins=[])
    assert caught.value.code == "damaged" and Path(name).name in caught.value.message


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": 1, "plan": ' + "[" * 100_000])
def test_a_manifest_nested_too_deeply_is_an_error_of_the_artifact(artifact, text):
    (artifact / "recipe.json").write_text(text)
    with pytest.raises(ArtifactError) as caught:
        load(artifact)
    assert caught.value.code == "damaged"


def test_only_true_is_trust(artifact):
    """``trust="no"`` would count as yes."""
    edit(artifact, lambda data: data.update(build={"kind": "named", "arch": f"{__name__}:tempting"}))
    for trust in ("no", 1, None):
        with pytest.raises(TypeError, match="expected True or False"):
            load(artifact, trust=trust)
    assert not CALLED
    with pytest.raises(TypeError, match=r"model got int; expected a torch\.nn\.Module"):
        load(artifact, model=7)


def test_a_model_that_refuses_the_weights_is_unchanged(artifact):
    class Refuses(Net):
        def load_state_dict(self, state, *args, **kwargs):
            super().load_state_dict(state, *args, **kwargs)
            raise RuntimeError("not today")

    mine = Refuses()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="RuntimeError: not today") as caught:
        load(artifact, model=mine)
    assert caught.value.code == "not-loadable" and caught.value.hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
