"""The recipe cache: a second run does not search, and nothing odd in the cache is ever used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
from cached_recipes import EXAMPLE, PLUGINS, edited, recipes, run
from fingerprints import optimized
from kpt.transaction import recipe
from slow_models import DerivedScale, DirectScale, Net, SinglesOnly, net, plugin


def closeness(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return -float((model(EXAMPLE) - net()(EXAMPLE)).abs().max())


def test_a_second_run_applies_and_judges_without_searching():
    first, kinds = run()
    assert first.searched and first.recipe == "miss" and "propose" in kinds
    second, kinds = run()
    assert not second.searched and second.recipe == "hit"
    assert "propose" not in kinds and kinds.count("trial") == 1
    assert [e.name for e in second.accepted] == [e.name for e in first.accepted]
    assert [e.rule for e in second.rejected] == ["value"]
    assert second.speedup_low > 1.0


def test_a_pass_may_be_of_the_phase_of_kernels():
    """It is no kernel: nothing judges it alone, and a recipe finds it among the passes."""
    offered = [plugin(DirectScale, hostile_passes.OnePercent, phase="kernels")]
    receipts = [run(plugins=offered)[0] for _ in range(2)]
    assert [receipt.searched for receipt in receipts] == [True, False]
    for receipt in receipts:
        assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
        assert receipt.accepted[0].phase == "kernels"
        assert [entry.rule for entry in receipt.rejected] == ["value"]


def test_the_cache_is_private_and_plain_data():
    run()
    (path,) = recipes()
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text())["recipe"]["steps"][0]["source"] == "DirectScale"
    assert not list(path.parent.glob("*.tmp"))


def linked(path: Path) -> None:
    target = path.with_suffix(".elsewhere")
    path.rename(target)
    path.symlink_to(target)


def linked_folder(path: Path) -> None:
    folder = path.parent
    target = folder.with_name("elsewhere")
    folder.rename(target)
    folder.symlink_to(target)


def unsigned_edit(path: Path) -> None:
    path.write_text(path.read_text().replace("DirectScale", "OnePercent"))


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "edited": unsigned_edit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\x80\x04\xff\xfe"),
    "a list": lambda path: path.write_text("[]"),
    "nested deeply": lambda path: path.write_text("[" * 100_000),
    "linked": linked,
    "linked folder": linked_folder,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "writable by all": lambda path: path.chmod(0o666),
    "folder writable by all": lambda path: path.parent.chmod(0o777),
    "another schema": edited(lambda body: body.update(schema=99)),
    "another key": edited(lambda body: body.update(key="0" * 64)),
    "no steps": edited(lambda body: body.pop("steps")),
    "unknown phase": edited(lambda body: body["steps"][0].update(phase="shell")),
    "unknown source": edited(lambda body: body["steps"][0].update(source="Absent")),
    "unknown field": edited(lambda body: body["steps"][0]["variant"].update(entry="os:system")),
    "bad level": edited(lambda body: body["steps"][0]["variant"].update(level="root")),
    "bad sites": edited(lambda body: body["steps"][0]["variant"].update(sites=3)),
    "bad figures": edited(lambda body: body.update(figures=[1])),
    "bad rejections": edited(lambda body: body["figures"].update(rejected=[{"evil": 1}])),
    "a level that was not asked for": edited(
        lambda body: body["steps"][0]["variant"].update(level="aggressive")
    ),
    "a variant that nobody offers": edited(lambda body: body["steps"][0]["variant"].update(name="mine")),
    "parameters that nobody offers": edited(
        lambda body: body["steps"][0]["variant"].update(params={"rounds": 0})
    ),
    "a phase that the pass is not of": edited(lambda body: body["steps"][0].update(phase="compile")),
    "the wrong pass": edited(lambda body: body["steps"][0].update(source="OnePercent")),
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS)
def test_a_cache_that_was_tampered_with_leads_to_a_clean_search(tamper, cached):
    tamper(cached)
    receipt, kinds = run()
    assert receipt.searched and "propose" in kinds
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert any("recipe" in note for note in receipt.notes), receipt.notes


def test_a_recipe_cannot_change_how_its_steps_are_judged():
    plugins = [plugin(DerivedScale)]
    first, _ = run(plugins=plugins)
    (path,) = recipes()
    claims = {"derives": False, "level": "production", "reproducible": True, "compute_dtype": "bfloat16"}
    edited(lambda body: body["steps"][0]["variant"].update(claims, sites=["slow"], setup_seconds=9.0))(path)
    receipt, _ = run(plugins=plugins)
    assert receipt.recipe == "hit" and not receipt.searched
    assert receipt.watched_tensors == first.watched_tensors > 0
    step = receipt.recipe_data["steps"][0]["variant"]
    assert step == first.recipe_data["steps"][0]["variant"] and step["derives"] is True


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners exist on POSIX only")
def test_a_cache_that_belongs_to_somebody_else(monkeypatch, cached):
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    receipt, _ = run()
    assert receipt.searched and any("belongs to another user" in note for note in receipt.notes)


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "file"))
    receipt, _ = run()
    assert receipt.searched and any("could not be stored" in note for note in receipt.notes)


@pytest.mark.parametrize(
    "options",
    [
        {"level": "exact"},
        {"objective": "throughput"},
        {"dynamic_shapes": {"x": {0: "batch"}}},
        {"plugins": [plugin(DirectScale, DerivedScale)]},
        {"fuel": 1},
        {"accuracy": kpt.Accuracy(closeness, max_drop=1e-4)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_settings_have_a_recipe_of_their_own(options, cached):
    receipt, _ = run(**options)
    assert receipt.recipe == "miss" and receipt.searched and len(recipes()) == 2


def _wider(model: Net) -> None:
    model.last = torch.nn.Linear(16, 5)


CHANGES: dict[str, Callable[[Net], object]] = {
    "mode": lambda model: model.train(),
    "structure": _wider,
    "an attribute": lambda model: setattr(model.norm, "eps", 1e-3),
    "trainability": lambda model: model.first.requires_grad_(False),
    "the mode of a submodule": lambda model: model.norm.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_model_has_a_recipe_of_its_own(change, cached):
    model = net()
    change(model)
    optimized(model, EXAMPLE, plugins=PLUGINS, cache=True)
    assert kpt.report(model).recipe == "miss" and len(recipes()) == 2


def test_ambient_settings_are_part_of_the_key(cached):
    with torch.autocast("cpu", torch.bfloat16):
        optimized(net(), EXAMPLE, plugins=PLUGINS, cache=True)
    torch.set_float32_matmul_precision("high")
    try:
        run()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(recipes()) == 3


def test_finding_nothing_is_remembered_too():
    model = net()
    for searched in (True, False):
        kpt.optimize(model, EXAMPLE, plugins=[plugin(hostile_passes.OnePercent)], budget=20.0)
        receipt = kpt.report(model)
        assert receipt.searched is searched and not receipt.optimized and receipt.reason
        assert [entry.rule for entry in receipt.rejected] == ["value"]
    assert fingerprints.ours(model) == []


def test_finding_nothing_for_one_mixture_of_calls_is_no_answer_for_another():
    """A static size would be part of the key; the dynamic batch is not."""

    def mixed(*rows: int) -> kpt.Receipt:
        model, examples = net(), [torch.randn(n, 16) for n in rows]
        wrong, shapes = [plugin(hostile_passes.OnePercent)], {"x": {0: "batch"}}
        kpt.optimize(model, examples, plugins=wrong, budget=20.0, dynamic_shapes=shapes)
        return kpt.report(model)

    assert mixed(2, 2, 2, 30).searched
    again = mixed(2, 2, 2, 28)
    assert not again.searched and again.recipe == "hit" and not again.optimized
    other = mixed(2, 30, 31, 29)
    assert other.searched and "another mixture of calls" in other.recipe
    assert any("another mixture" in note for note in other.notes)
    for rows in ((2, 2, 2, 30), (2, 30, 31, 29)):  # the cache answers for both by now
        assert not mixed(*rows).searched


def mixed(budget: float, *rows: int) -> kpt.Receipt:
    """The receipt of calls of so many rows each, with a variant that pays for single rows only."""
    model, examples = net(), [torch.randn(n, 16) for n in rows]
    shapes = {"x": {0: "batch"}}
    kpt.optimize(model, examples, plugins=[plugin(SinglesOnly)], budget=budget, dynamic_shapes=shapes)
    return kpt.report(model)


SINGLES, BATCHES = (1, 1, 1, 1, 1, 1, 1, 18), (30, 30, 30, 30)


def test_a_plan_of_one_mixture_and_nothing_for_another_stay_beside_each_other():
    """They had erased each other, so that every process of the two programs searched."""

    first = mixed(20.0, *SINGLES)
    assert first.searched and first.optimized
    other = mixed(20.0, *BATCHES)
    assert other.searched and not other.optimized and other.rejected[0].rule == "slower"
    for _ in range(2):
        again = mixed(20.0, *SINGLES)
        assert again.optimized and not again.searched and again.recipe == "hit"
        nothing = mixed(20.0, *BATCHES)
        assert not nothing.optimized and not nothing.searched and nothing.recipe == "hit"
        assert "on calls like these" in nothing.reason


def test_what_a_larger_budget_finds_nothing_for_leaves_the_plan_for_other_calls():
    """A plan whose search ran out of time is searched for again with more, and not erased by that."""

    assert mixed(20.0, *SINGLES).optimized
    (path,) = recipes()
    wrapped = json.loads(path.read_text())
    late = {
        "name": "late",
        "phase": "compile",
        "plugin": "toy",
        "rule": "budget",
        "reason": "no time",
        "gain": None,
    }
    wrapped["recipe"]["figures"]["rejected"] = [{**late, "figures": {}}]
    wrapped["sha256"] = recipe._digest(wrapped["recipe"])
    path.write_text(json.dumps(wrapped))
    other = mixed(60.0, *BATCHES)
    assert other.searched and not other.optimized and "smaller budget" in other.recipe
    assert not mixed(60.0, *BATCHES).searched
    again = mixed(20.0, *SINGLES)
    assert again.optimized and not again.searched


def test_a_search_in_place_of_a_recipe_that_came_too_late_leaves_it_for_other_calls():
    assert mixed(20.0, *SINGLES).optimized
    (path,) = recipes()
    edited(lambda body: body["figures"].update(not_within=20.0))(path)
    other = mixed(20.0, *BATCHES)
    assert other.searched and not other.optimized
    assert any("could not be set up with a budget of 20 s" in note for note in other.notes)
    assert json.loads(path.read_text())["recipe"]["figures"]["mixtures"] == []  # it was not tried on them
    again = mixed(40.0, *SINGLES)
    assert again.optimized and not again.searched


def test_a_gain_in_doubt_is_told_by_a_recipe_too(cached):
    names = [e.name for e in run()[0].accepted]

    def by_name(data: dict) -> None:
        data["figures"]["doubts"] = {names[0]: "in doubt: its gain lies between 0.97x and 1.30x"}

    edited(by_name)(cached)
    receipt, _ = run()
    assert not receipt.searched and "in doubt: its gain lies" in receipt.accepted[0].reason


@pytest.mark.parametrize("figures", [{"doubts": [1]}, {"doubts": {"a": 1}}, {"mixtures": 3}])
def test_malformed_figures_of_a_recipe_lead_to_a_search(figures, cached):
    edited(lambda data: data["figures"].update(figures))(cached)
    refused, _ = run()
    assert refused.searched and "of the recipe are malformed" in " ".join(refused.notes)


def test_without_the_cache_nothing_is_read_or_written(cached):
    receipt, _ = run(cache=False)
    assert receipt.searched and receipt.recipe == "cache off"
    cached.unlink()
    run(cache=False)
    assert recipes() == []
