"""Saving and loading: what is damaged, foreign or executable is refused, and nothing is lost."""

from __future__ import annotations

import functools
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
import slow_models
from kpt.artifact import ArtifactError
from kpt.specs import AdapterError, AdapterSpec
from slow_models import DirectScale, Net, net, plugin

pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def saved(tmp_path: Path, **options: Any) -> tuple[Path, torch.nn.Module, torch.Tensor]:
    model, x = net(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20)
    assert kpt.report(model).optimized
    return kpt.save(model, tmp_path / "artifact", **options), model, x


def load(path: Path, **options: Any) -> torch.nn.Module:
    return kpt.load(path, plugins=[plugin(DirectScale)], **options)


def edit(path: Path, change: Any) -> None:
    data = json.loads((path / "recipe.json").read_text())
    change(data)
    (path / "recipe.json").write_text(json.dumps(data))


def test_a_saved_model_comes_back_optimised_without_a_search(tmp_path: Path) -> None:
    path, model, x = saved(tmp_path)
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "recipe.json",
        "receipt.json",
        "verify",
    }
    again = load(path)
    receipt = kpt.report(again)
    assert receipt.optimized and not receipt.searched
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert kpt.report(again).calls["optimized"] == 1


def test_the_factory_that_the_user_names_builds_the_model(tmp_path: Path) -> None:
    path, model, x = saved(tmp_path, build={"arch": "slow_models:net"})
    assert isinstance(load(path, arch="slow_models:Net"), Net)
    assert kpt.report(load(path, model=slow_models.Net())).optimized


def test_a_model_in_another_state_is_unchanged_by_a_failed_load(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    edit(path, lambda data: data["aliases"].update(more="nothing"))
    mine = slow_models.Net()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="tied to nothing"):
        load(path, model=mine)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("file", ["model.safetensors", "verify/inputs.safetensors", "receipt.json"])
def test_a_file_whose_checksum_differs_is_refused(tmp_path: Path, file: str) -> None:
    path, _, _ = saved(tmp_path)
    raw = bytearray((path / file).read_bytes())
    raw[-1] ^= 1
    (path / file).write_bytes(raw)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    (path / "verify" / "original.safetensors").unlink()
    with pytest.raises(ArtifactError, match="original.safetensors is missing"):
        load(path)


def test_outputs_that_are_not_those_that_were_saved_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from kpt.artifact.folder import sha256

    path, _, _ = saved(tmp_path)
    file = path / "verify" / "original.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(str(file)).items()}, str(file))
    edit(path, lambda data: data["files"].update({"verify/original.safetensors": sha256(file)}))
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert caught.value.code == "verify"


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    edit(path, lambda data: data.update(schema=99))
    with pytest.raises(ArtifactError, match="schema 99"):
        load(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    with pytest.raises(ArtifactError, match="do not fit Linear"):
        load(path, model=torch.nn.Linear(2, 2))


def test_a_path_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    (tmp_path / "elsewhere").write_text("x")
    edit(path, lambda data: data["files"].update({"../elsewhere": "0"}))
    with pytest.raises(ArtifactError, match="outside of the folder"):
        load(path)


def test_a_model_that_only_a_pickle_can_build_needs_trust(tmp_path: Path) -> None:
    model, x = (
        torch.nn.Sequential(slow_models.SlowScale(16), torch.nn.Linear(16, 4)).eval(),
        torch.randn(8, 16),
    )
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20)
    path = kpt.save(model, tmp_path / "artifact")
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert caught.value.code == "untrusted"
    again = load(path, trust=True)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_recipe_that_does_not_hold_here_leaves_the_model_unoptimised_and_says_so(tmp_path: Path) -> None:
    path, model, x = saved(tmp_path)
    with pytest.warns(UserWarning, match="does not hold here"):
        again = kpt.load(path, plugins=[plugin()])
    assert not kpt.report(again).optimized and "forward" not in again.__dict__
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artifact"):
        saved(tmp_path)
    assert (tmp_path / "artifact" / "thesis.txt").read_text() == "years of work"


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = net()
    model.last = torch.nn.Linear(16, 16)
    model.last.weight = model.first.weight
    x = torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20)
    path = kpt.save(model, tmp_path / "artifact")
    again = load(path, trust=True)
    assert again.last.weight is again.first.weight
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_the_parameters_of_a_model_that_was_passed_stay_the_same_objects(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    mine = slow_models.Net()
    held = dict(mine.named_parameters())
    load(path, model=mine)
    assert all(parameter is held[name] for name, parameter in mine.named_parameters())


def test_a_model_of_another_dtype_is_refused_and_keeps_parameters_values_and_modes(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    mine = slow_models.Net().double().train()
    mine.norm.eval()
    held = dict(mine.named_parameters())
    with pytest.raises(ArtifactError, match="stored as torch.float32") as caught:
        load(path, model=mine)
    assert caught.value.code == "wrong-dtype"
    assert all(p is held[name] and p.dtype == torch.float64 for name, p in mine.named_parameters())
    assert mine.training and mine.first.training and not mine.norm.training


def test_a_load_that_fails_late_restores_the_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.artifact import verification

    path, _, _ = saved(tmp_path)
    mine = slow_models.Net().train()
    mine.norm.eval()

    def fails(*args: Any) -> None:
        raise ArtifactError("verify", "no")

    monkeypatch.setattr(verification, "check", fails)
    with pytest.raises(ArtifactError):
        load(path, model=mine)
    assert mine.training and mine.first.training and not mine.norm.training


CALLED: list[int] = []


def tempting() -> Net:
    CALLED.append(1)
    return net()


@pytest.mark.parametrize("arch", ["os:abort", f"{__name__}:tempting", "slow_models:net", "absent_module:Net"])
def test_nothing_but_a_known_class_of_modules_is_called_without_trust(tmp_path: Path, arch: str) -> None:
    path, _, _ = saved(tmp_path)
    edit(path, lambda data: data.update(build={"kind": "named", "arch": arch}))
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert caught.value.code == "untrusted" and not CALLED


def test_saving_what_cannot_be_verified_warns(tmp_path: Path) -> None:
    model = net(training=True)
    kpt.optimize(model, torch.randn(8, 16), plugins=[plugin(DirectScale)], budget=20)
    with pytest.warns(UserWarning, match="in training mode"):
        kpt.save(model, tmp_path / "artifact")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_leads_to_the_new_artifact(tmp_path: Path, there: bool) -> None:
    path, model, x = saved(tmp_path)
    place = path if there else tmp_path / "later"
    (tmp_path / "current").symlink_to(place)
    before = path.stat().st_ino
    assert kpt.save(model, tmp_path / "current") == place.resolve()
    assert (tmp_path / "current").is_symlink() and (place / "recipe.json").is_file()
    assert (path.stat().st_ino != before) is there


def test_a_replacement_that_fails_leaves_the_artifact_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, _ = saved(tmp_path)
    before = (path / "recipe.json").read_bytes()
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target) == path and "-old-" not in str(self):
            raise OSError("no space left")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        kpt.save(model, path)
    assert (path / "recipe.json").read_bytes() == before
    monkeypatch.undo()
    kpt.save(model, path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".artifact")] == []


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


def in_module(monkeypatch: pytest.MonkeyPatch, cls: type) -> type:
    """``cls`` as the class ``Odd`` of an imported module, so that an artifact may name it."""
    home = types.ModuleType("kpt_test_artifact_home")
    home.Odd = cls  # type: ignore[attr-defined]
    cls.__module__, cls.__qualname__, cls.__name__ = home.__name__, "Odd", "Odd"
    monkeypatch.setitem(sys.modules, home.__name__, home)
    return cls


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)


def unoptimised(model: torch.nn.Module, path: Path) -> Path:
    return kpt.save(kpt.optimize(model.eval(), torch.randn(4, 8), plugins=[], cache=False), path)


def test_a_model_that_was_saved_unoptimised_has_its_receipt_and_is_saved_again(tmp_path, monkeypatch):
    class Plain(Linear):
        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Plain)
    again = kpt.load(unoptimised(Plain(), tmp_path / "first"), plugins=[])
    assert kpt.report(again).reason == "no plugin had anything to offer here"
    second = kpt.load(kpt.save(again, tmp_path / "second"), plugins=[])
    assert torch.equal(second.linear.weight, again.linear.weight)
    kpt.optimize(again, torch.randn(4, 8), plugins=[plugin(DirectScale)], budget=5)
    kpt.refresh(second)


def test_saving_and_loading_leave_buffers_and_random_states_alone(tmp_path, monkeypatch):
    class Counting(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(4, 8))

        def forward(self, x):
            self.calls.add_(1)
            self.last = x + self.calls
            return self.linear(x)

    model = in_module(monkeypatch, Counting)()
    kpt.optimize(model.eval(), torch.randn(4, 8), plugins=[], cache=False)
    model.calls.fill_(7)
    last, random = model.last, torch.get_rng_state()
    path = kpt.save(model, tmp_path / "artifact")
    assert float(model.calls) == 7 and model.last is last and torch.equal(torch.get_rng_state(), random)
    assert float(kpt.load(path, plugins=[]).calls) == 7


def test_a_model_that_draws_random_numbers_is_verified_by_its_shapes(tmp_path, monkeypatch):
    class Noisy(Linear):
        def forward(self, x):
            return self.linear(x) + torch.randn(8)

    in_module(monkeypatch, Noisy)
    path = unoptimised(Noisy(), tmp_path / "artifact")
    assert json.loads((path / "recipe.json").read_text())["verify"]["random"] is True
    kpt.load(path, plugins=[])


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
        {"plan": {"steps": "x"}},
        {"plan": {"steps": [7]}},
        {"verify": {"leaves": 7}},
        {"build": {"kind": 7}},
    ],
)
def test_a_manifest_that_says_something_else_is_an_error_of_the_artifact(tmp_path, change):
    path, _, _ = saved(tmp_path)
    edit(path, lambda data: data.update(change))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = load(path)
        except ArtifactError as error:
            assert error.hint
            return
    assert not kpt.report(model).optimized
    assert any("does not hold here" in str(warning.message) for warning in said)


@pytest.mark.parametrize("key", ["plan", "build", "aliases", "training", "request", "verify", "files"])
def test_a_manifest_that_lacks_an_entry_is_an_error_of_the_artifact(tmp_path, key):
    path, _, _ = saved(tmp_path)
    edit(path, lambda data: data.pop(key))
    with pytest.raises(ArtifactError, match=f"nothing as '{key}'"):
        load(path)


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


class Nested(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: dict[str, torch.Tensor], scale: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(batch["x"]) if scale is None else self.net(batch["x"]) * scale


@pytest.mark.parametrize(
    "declared",
    [
        {"batch": {"x": {0: "rows", 1: None}}},
        {"batch": {"x": {-2: torch.export.Dim.DYNAMIC}}},
        {"batch": {"x": [("rows", 2, 64), 16]}},
        {"batch": {"x": {0: torch.export.Dim("rows", min=2, max=64)}}, "scale": None},
    ],
)
def test_every_form_of_declared_dimensions_is_saved(tmp_path: Path, declared: Any) -> None:
    model = Nested().eval()
    example = {"batch": {"x": torch.randn(8, 16)}}
    kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=20, dynamic_shapes=declared)
    assert kpt.report(model).optimized
    again = load(kpt.save(model, tmp_path / "artifact"), model=Nested())
    with torch.no_grad():
        for rows in (3, 11):
            call = {"x": torch.randn(rows, 16)}
            assert torch.equal(again(call), model(call))
    assert kpt.report(again).calls["optimized"] == 2
