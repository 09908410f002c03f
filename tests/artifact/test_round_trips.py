"""A saved model comes back optimised without a search, and saving leaves all else as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kpt
import slow_models
from artifacts import Linear, in_module, load, saved, unoptimised
from kpt.artifact import ArtifactError
from kpt.judge.layouts import with_layout
from slow_models import DirectScale, Net, net, plugin

pytest.importorskip("safetensors")


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


def test_the_parameters_of_a_model_that_was_passed_stay_the_same_objects(artifact: Path) -> None:
    mine = slow_models.Net()
    held = dict(mine.named_parameters())
    load(artifact, model=mine)
    assert all(parameter is held[name] for name, parameter in mine.named_parameters())


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


@pytest.mark.parametrize("by", ["class", "arch", "pickle"])
def test_frozen_parameters_stay_frozen(tmp_path: Path, by: str) -> None:
    model: Any = net()
    model.first.requires_grad_(False)
    if by == "pickle":
        model.note = "what the constructor does not set"
    kpt.optimize(model, torch.randn(8, 16), plugins=[plugin(DirectScale)], budget=20)
    path = kpt.save(model, tmp_path / "artifact")
    again = load(path, arch="slow_models:Net") if by == "arch" else load(path, trust=True)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    own = Net()
    assert all(parameter.requires_grad for parameter in load(path, model=own).parameters())


def test_a_buffer_whose_elements_share_memory_comes_back(tmp_path, monkeypatch):
    class Expanded(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("ones", torch.ones(1).expand(8))

        def forward(self, x):
            return self.linear(x) * self.ones

    model = in_module(monkeypatch, Expanded)()
    path = unoptimised(model, tmp_path / "artifact")
    assert torch.equal(kpt.load(path, plugins=[]).ones, torch.ones(8))
    mine = Expanded()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(ArtifactError, match="does not take the weights.*ones"):
        kpt.load(path, plugins=[], model=mine)  # torch loads no state dict into such a buffer
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


def test_a_name_that_the_format_reserves_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    class Reserved(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("__metadata__", torch.ones(8))

        def forward(self, x):
            return self.linear(x)

    in_module(monkeypatch, Reserved)
    with pytest.raises(ArtifactError, match="__metadata__"):
        unoptimised(Reserved(), tmp_path / "artifact")
    assert not list(tmp_path.glob("*artifact*"))


@pytest.mark.parametrize(
    "build",
    [
        "slow_models:net",
        {"arch": 7},
        {"arch": "slow_models"},
        {"factory": "slow_models:net"},
        ["slow_models:net"],
    ],
)
def test_a_build_that_no_load_could_read_is_refused(tmp_path: Path, build: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"build=.*expected \{\"arch\": \"module:factory\"\}"):
        saved(tmp_path, build=build)
    assert not list(tmp_path.glob("*artifact*"))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_a_plan_that_was_proved_for_a_layout_serves_it_after_loading(tmp_path: Path, layout: str) -> None:
    model, x = net(), with_layout(torch.randn(8, 16), layout)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20)
    assert kpt.report(model).optimized
    again = load(kpt.save(model, tmp_path / "artifact"))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert kpt.report(again).calls["optimized"] == 1, kpt.report(again).calls
