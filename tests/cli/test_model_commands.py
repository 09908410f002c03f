"""``kpt optimize``, ``explain`` and ``bench`` on a small model."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import kpt
from kpt.artifact.folder import ArtifactError
from kpt.cli.contest import Entrant, by_name, contest, eager
from kpt.cli.explain import _table
from kpt.cli.output import CommandError, Output
from kpt.judge.calls import Call
from kpt.plugins import registry
from kpt.transaction.receipt import Entry, Receipt

INPUTS = "x=float32[4,8]"


def receipt() -> Receipt:
    kept = Entry("freeze", "compile", "cpu", "kept", "1.40x in company", 1.4)
    wrong = Entry("fast", "kernels", "cpu", "value", "wrong by 1 %", 2.0)
    return Receipt("Net", "inference", "exact", "latency", accepted=[kept], rejected=[wrong])


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


def test_optimize_passes_everything_on_and_writes_an_artifact(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file
    answer = kpt_cli(
        *(
            "optimize",
            "--model",
            path,
            "--arch",
            arch,
            "--inputs",
            INPUTS,
            "--level",
            "exact",
            "--budget",
            "7",
        ),
        *("--objective", "throughput", "--dynamic", "x:0=batch", "--no-plugins", "--no-cache"),
        *("--out", tmp_path / "artifact", "--json"),
    )
    assert answer.code == 0, answer.err
    assert answer.json["artifact"] == str(tmp_path / "artifact")
    assert answer.json["receipt"]["rejected"][0]["rule"] == "value"
    assert "building the network" in answer.err and "building" not in answer.out
    asked = {
        key: optimized[key] for key in ("level", "objective", "budget", "dynamic_shapes", "plugins", "cache")
    }
    assert asked == {
        "level": "exact",
        "objective": "throughput",
        "budget": 7.0,
        "dynamic_shapes": {"x": {0: "batch"}},
        "plugins": [],
        "cache": False,
    }
    assert optimized["build"] == {"arch": arch}
    assert optimized["inputs"]["x"].shape == (4, 8) and not optimized["model"].training


def test_optimize_refuses_before_it_searches(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file
    base = ("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS, "--out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert "not an artifact" in kpt_cli(*base, tmp_path / "other").err
    assert kpt_cli(*base, tmp_path / "a").code == 0
    again = kpt_cli(*base, tmp_path / "a")
    assert again.code == 2 and "--overwrite" in again.err
    optimized.clear()
    for wrong in (
        ("--level", "fast"),
        ("--objective", "speed"),
        ("--budget", "-1"),
        ("--budget", "0"),
        ("--budget", "nan"),
        ("--dynamic", "x"),
        ("--plugins", "cpu", "--no-plugins"),
        ("--device", "nonsense"),
    ):
        answer = kpt_cli(*base, tmp_path / "b", *wrong)
        assert answer.code == 2, wrong
    budget = kpt_cli(*base, tmp_path / "b", "--budget", "0", "--json").json
    assert budget["message"].startswith("--budget 0 is not") and "--budget 60" in budget["hint"]
    assert not optimized and not (tmp_path / "b").exists()


def test_optimize_names_what_is_wrong_with_a_model_file(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file

    def code(*options):
        answer = kpt_cli("optimize", "--inputs", INPUTS, "--out", tmp_path / "x", *options, "--json")
        return answer.code, answer.json["code"]

    assert code("--model", tmp_path / "missing.pt") == (2, "not-found")
    assert code("--model", path) == (2, "needs-arch")
    assert code("--model", path, "--arch", "not_there_42:x") == (2, "bad-arch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    assert code("--model", tmp_path / "whole.pt") == (1, "untrusted")
    assert not optimized
    answer = kpt_cli(
        *("optimize", "--model", tmp_path / "whole.pt", "--inputs", "float32[1,2]", "--trust-model"),
        *("--out", tmp_path / "trusted", "--json"),
    )
    assert answer.code == 0 and "sha256" in answer.err and "torch.nn.modules.linear.Linear" in answer.err


def test_a_plugin_that_is_asked_for_and_missing_is_an_error(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file
    answer = kpt_cli(
        *("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS),
        *("--plugins", "no-such-plugin", "--out", tmp_path / "x", "--json"),
    )
    assert answer.code == 1 and answer.json["code"] == "plugin" and "no-such-plugin" in answer.json["message"]


@pytest.mark.parametrize("out", ["file/artifact", "sealed/artifact", "."])
def test_a_place_where_no_artifact_can_be_is_refused_before_the_search(
    kpt_cli, model_file, optimized, tmp_path, monkeypatch, out
):
    path, arch = model_file
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sealed").mkdir()
    writable = os.access
    monkeypatch.setattr(
        "os.access", lambda place, mode: Path(place).name != "sealed" and writable(place, mode)
    )
    answer = kpt_cli("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS, "--out", out)
    assert answer.code == 2 and f"--out {out}" in answer.err and not optimized


def test_a_save_over_the_folder_that_the_program_runs_in_is_refused(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2).eval()
    kpt.optimize(model, torch.randn(1, 2), budget=2.0, plugins=[], cache=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="is where the program runs"):
        kpt.save(model, ".")
    assert not list(tmp_path.iterdir())


def test_an_exported_program_is_optimised_with_its_own_example(kpt_cli, tmp_path):
    example = torch.randn(2, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2)).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "program.pt2")
    options = ("optimize", "--model", tmp_path / "program.pt2", "--trust-model", "--no-plugins", "--no-cache")
    answer = kpt_cli(*options, "--budget", "5", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.out
    assert answer.json["receipt"]["mode"] == "inference"
    assert "exported with" in answer.err and f"{tmp_path / 'program.pt2'}: keep" in answer.err
    loaded = kpt.load(tmp_path / "out", trust=True)
    torch.testing.assert_close(loaded(example), model(example))
    by_name = kpt_cli(
        *options, "--budget", "5", "--out", tmp_path / "named", "--inputs", "input=float32[4,3]"
    )
    assert by_name.code == 0, by_name.err


def test_a_selection_of_no_name_is_no_selection_of_all(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file
    answer = kpt_cli("optimize", "--model", path, "--arch", arch, "--plugins", ",", "--out", tmp_path / "x")
    assert answer.code == 2 and "--no-plugins" in answer.err and not optimized


def test_nothing_is_run_on_meta(kpt_cli, model_file, optimized, tmp_path):
    path, arch = model_file
    base = ("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS, "--out", tmp_path / "x")
    answer = kpt_cli(*base, "--device", "meta")
    assert answer.code == 2 and "holds no values" in answer.err


def test_an_artifact_that_cannot_be_written_is_named(kpt_cli, model_file, optimized, tmp_path, monkeypatch):
    def save(model, folder, build=None):
        raise OSError("No space left on device")

    monkeypatch.setitem(vars(kpt), "save", save)
    path, arch = model_file
    answer = kpt_cli(
        *("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS, "--out", tmp_path / "x", "--json"),
    )
    assert answer.code == 1 and answer.json["code"] == "not-saved" and "No space" in answer.json["message"]
    assert "is not repeated" in answer.json["hint"]
    options = ("--inputs", INPUTS, "--out", tmp_path / "x", "--no-cache", "--json")
    again = kpt_cli("optimize", "--model", path, "--arch", arch, *options).json
    assert again["hint"] == "Choose another --out."


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    from kpt.cli.optimize import progress
    from kpt.transaction.events import emit

    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=terminal: answer)
        with progress(10.0):
            emit("trial", "freeze [layer]\n" + "x" * 500, seconds=1.2, budget=10.0)
        printed = capsys.readouterr().err
        assert ("[1 of 10 s] trial: freeze [layer] xxx" in printed) is terminal
        assert "\n" not in printed and len(printed) < 400


def test_explain_prints_a_receipt_from_an_artifact_or_a_file(kpt_cli, tmp_path):
    (tmp_path / "receipt.json").write_text(receipt().to_json())
    for path in (tmp_path, tmp_path / "receipt.json"):
        answer = kpt_cli("explain", path)
        assert answer.code == 0 and "freeze" in answer.out and "wrong by 1 %" in answer.out
        assert kpt_cli("explain", path, "--json").json["accepted"][0]["name"] == "freeze"
    wrapped = {"artifact": "x", "receipt": receipt().to_dict()}
    (tmp_path / "printed.json").write_text(json.dumps(wrapped))
    assert kpt_cli("explain", tmp_path / "printed.json").code == 0


def test_explain_prints_figures_sites_and_what_was_left_alone(kpt_cli, tmp_path):
    judged = Entry("bf16", "precision", "cpu", "kept", "right and faster", 1.4, {"error": 0.00123})
    norm = {
        "op": "rms_norm",
        "path": "layers.0.norm",
        "kind": "module",
        "binding": {"arguments": {"eps": "self.variance_epsilon"}},
    }
    full = Receipt("Net", "inference", "exact", "latency", accepted=[judged], rejected=receipt().rejected)
    full.sites, full.left_alone = [norm, {**norm, "path": "norm"}], [["head", "its output is random"]]
    (tmp_path / "receipt.json").write_text(full.to_json())
    shown = kpt_cli("explain", tmp_path).out
    assert "error 0.00123" in shown and "none: it was not judged" in shown
    assert "recognised: 2 × rms_norm" in shown
    assert "layers.0.norm" in shown and "eps=self.variance_epsilon" in shown
    assert "left alone: head: its output is random" in shown


def test_explain_says_that_a_recipe_is_no_receipt(kpt_cli, tmp_path):
    recipe = {"schema": 1, "key": "k", "steps": [], "figures": {}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    answer = kpt_cli("explain", tmp_path / "recipe.json", "--json")
    assert answer.code == 1 and answer.json["code"] == "bad-receipt"
    assert "it is a recipe, which holds a plan only" in answer.json["message"]
    assert "receipt.json" in answer.json["hint"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 999}', '{"schema": 1, "model": "Net"}'])
def test_explain_names_what_is_no_receipt(kpt_cli, tmp_path, content):
    (tmp_path / "receipt.json").write_text(content)
    answer = kpt_cli("explain", tmp_path / "receipt.json", "--json")
    assert answer.code == 1 and answer.json["code"] == "bad-receipt"
    assert kpt_cli("explain", tmp_path / "missing").code == 2
    assert kpt_cli("explain").code == 2


def test_explain_takes_the_folder_that_it_runs_in(kpt_cli, tmp_path, monkeypatch):
    (tmp_path / "receipt.json").write_text(receipt().to_json())
    monkeypatch.chdir(tmp_path)
    assert "1.40x in company" in kpt_cli("explain", ".").out
    assert kpt_cli("explain", ".", "--model", ".").code == 2


def test_explain_lists_the_ops_of_a_model(kpt_cli, model_file):
    path, arch = model_file
    options = ("explain", "--model", path, "--arch", arch, "--inputs", INPUTS, "--no-plugins")
    sites = kpt_cli(*options, "--json").json["sites"]
    assert {site["op"]: site["path"] for site in sites} == {"layer_norm": "norm", "linear": "out"}
    assert "1 × layer_norm, 1 × linear" in kpt_cli(*options).out


def test_brackets_in_a_result_are_no_markup():
    site = {"op": "linear", "path": "out", "kind": "module", "arguments": {"weight": "self.packed[bits]"}}
    alone = [["norm", "ValueError: no [eps] in [/model]"]]
    data = {"model": "Net", "parameters": 1, "sites": [site], "left_alone": alone}
    shown = io.StringIO()
    Output(stdout=shown).result({}, _table(data))
    assert "self.packed[bits]" in shown.getvalue() and "no [eps] in [/model]" in shown.getvalue()


def entrants(*functions):
    def prepared(function):
        return lambda model, example: lambda inputs: function(model, inputs)

    return [eager(), *(Entrant(f.__name__, prepared(f)) for f in functions)]


def test_contenders_see_the_same_fresh_inputs_and_wrong_or_failing_ones_are_told_apart():
    seen: dict[str, list[float]] = {"right": [], "wrong": []}

    def right(model, inputs):
        seen["right"].append(float(inputs["input"].sum()))
        return model(**inputs)

    def wrong(model, inputs):
        seen["wrong"].append(float(inputs["input"].sum()))
        inputs["input"].zero_()
        return {"out": model(**inputs) * 1.01}

    def failing(model, inputs):
        raise SystemExit("no licence")

    def late(model, inputs):
        if calls["late"]:
            raise OSError("only the first shape")
        calls["late"] += 1
        return model(**inputs)

    calls = {"late": 0}
    model = torch.nn.Linear(4, 4)
    weights = model.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    found = entrants(right, wrong, failing, late)
    contest(
        model,
        found,
        lambda: Call((torch.randn(2, 4, generator=generator),)),
        seconds=0.0,
        rounds=6,
        tell=lambda t: None,
    )
    by = {entrant.name: entrant for entrant in found}
    assert by["right"].error == 0.0 and by["wrong"].error > 1e-3
    assert "SystemExit: no licence" in by["failing"].failed and "OSError" in by["late"].failed
    assert len(by["right"].spans) == len(by["eager"].spans) == len(by["wrong"].spans) >= 5
    assert by["right"].low <= by["right"].ratio <= by["right"].high
    assert seen["right"][1:] == seen["wrong"][1:] and len(set(seen["right"][1:])) > 5
    assert torch.equal(model.weight, weights)


def test_a_contender_that_fails_while_it_is_timed_leaves_the_others_in():
    left = 4

    def tires(model, inputs):
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit("out of credits")
        return model(**inputs)

    def steady(model, inputs):
        return model(**inputs)

    model = torch.nn.Linear(4, 4)
    found = entrants(tires, steady)
    contest(model, found, lambda: Call((torch.ones(2, 4),)), seconds=0.0, rounds=6, tell=lambda text: None)
    reference, tired, other = found
    assert "while it was timed: SystemExit: out of credits" in tired.to_dict()["reason"]
    assert tired.to_dict()["state"] == "failed" and other.to_dict()["state"] == "ran"
    assert len(other.spans) == len(reference.spans) >= 5


def test_what_a_contender_does_while_it_is_prepared_is_its_own():
    def changes(model, example):
        example["input"].zero_()
        torch.set_default_dtype(torch.float64)
        return lambda inputs: model(**inputs)

    seen = []

    def looks(model, example):
        seen.append((float(example["input"].sum()), torch.get_default_dtype()))
        return lambda inputs: model(**inputs)

    found = [eager(), Entrant("changes", changes), Entrant("looks", looks)]
    draw = lambda: Call((torch.ones(2, 4),))  # noqa: E731
    contest(torch.nn.Linear(4, 4), found, draw, seconds=0.0, rounds=5, tell=lambda text: None)
    assert seen == [(8.0, torch.float32)] and torch.get_default_dtype() is torch.float32


def test_a_model_that_does_not_run_itself_is_an_error_before_anybody_is_prepared():
    found = [eager(), Entrant("other", lambda model, example: pytest.fail("it was prepared"))]
    with pytest.raises(CommandError, match="does not run on these inputs: RuntimeError"):
        contest(
            torch.nn.Linear(4, 4),
            found,
            lambda: Call((torch.ones(2, 5),)),
            seconds=0.0,
            tell=lambda text: None,
        )


def test_inputs_get_the_names_of_the_forward():
    class Net(torch.nn.Module):
        def forward(self, x, mask=None, **rest):
            return x

    x = torch.ones(1)
    assert by_name(Net(), Call((x,), {"extra": 1})) == {"x": x, "extra": 1}


def test_bench_prints_every_contender_with_machine_and_versions(kpt_cli, model_file, optimized):
    path, arch = model_file
    options = (
        "bench",
        "--model",
        path,
        "--arch",
        arch,
        "--inputs",
        INPUTS,
        "--seconds",
        "0.1",
        "--no-plugins",
    )
    answer = kpt_cli(*options, "--json")
    assert answer.code == 0, answer.err
    data = answer.json
    assert [entry["name"] for entry in data["contenders"]] == ["eager", "kpt"]
    assert all(entry["state"] == "ran" and entry["seconds"] > 0 for entry in data["contenders"])
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["profile"]["name"]
    headline = receipt().headline()
    assert [entry["note"] for entry in data["contenders"]] == ["", headline]
    shown = kpt_cli(*options).out
    assert "vs eager" in shown and f"kpt prepared {headline}" in " ".join(shown.split())
    assert kpt_cli(*options, "--contenders", "nobody").code == 2


@pytest.mark.parametrize(
    "wrong", [("--seconds", "-4"), ("--seconds", "0"), ("--seconds", "inf"), ("--budget", "0")]
)
def test_bench_refuses_times_that_are_none_before_anything_runs(wrong, kpt_cli, model_file, optimized):
    path, arch = model_file
    answer = kpt_cli("bench", "--model", path, "--arch", arch, "--inputs", INPUTS, "--json", *wrong)
    assert answer.code == 2 and answer.json["code"] == "usage"
    assert f"{wrong[0]} {wrong[1]} is not a number of seconds above 0" in answer.json["message"]
    assert wrong[0] in answer.json["hint"] and not optimized
    assert kpt_cli("bench", "--tune", *wrong).code == 2


def test_contenders_of_plugins_take_part_or_say_what_they_lack():
    from kpt.cli.contest import installed
    from kpt.specs import ContenderSpec

    class Plugin:
        @kpt.hookimpl
        def kpt_contenders(self):
            yield ContenderSpec("lacking", "math:sqrt", requires=("not_there_42", "json"))
            yield ContenderSpec("present", "math:sqrt", requires=("json",))
            yield ContenderSpec("eager", "math:sqrt")

    found = {entrant.name: entrant for entrant in installed(registry([Plugin()]))}
    assert found["lacking"].absent == "needs not_there_42" and not found["present"].absent
    assert "needs another name" in found["eager"].absent


@pytest.mark.parametrize("command", ["optimize", "explain", "bench"])
@pytest.mark.parametrize(
    ("inputs", "found", "said"),
    [
        ("x=float32[4,9]", (1, "model-fails"), "does not run on these inputs: RuntimeError"),
        ("y=float32[4,8]", (2, "usage"), "do not fit Net.forward(x: "),
        ("float32[4,8] float32[4]", (2, "usage"), "too many positional arguments"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(
    command, inputs, found, said, kpt_cli, model_file, tmp_path
):
    path, arch = model_file
    out = ("--out", tmp_path / "out") if command == "optimize" else ()
    answer = kpt_cli(command, "--model", path, "--arch", arch, "--inputs", inputs, *out, "--json")
    assert (answer.code, answer.json["code"]) == found
    assert said in answer.json["message"] and "--inputs" in answer.json["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["optimize", "bench"])
def test_dynamic_dimensions_that_no_input_has_are_a_usage_error(command, kpt_cli, model_file):
    path, arch = model_file
    options = ("--model", path, "--arch", arch, "--inputs", INPUTS, "--json")
    for dynamic in ("z:0=batch", "x:7=batch"):
        answer = kpt_cli(command, *options, "--dynamic", dynamic)
        assert (answer.code, answer.json["code"]) == (2, "usage"), answer.json
        assert answer.json["message"].startswith("--dynamic: ")


def test_a_pickled_model_finds_its_classes_in_the_folder_where_it_is_trusted(
    kpt_cli, optimized, tmp_path, monkeypatch
):
    """As a program would that lies there; without trust nothing of the folder is imported."""
    (tmp_path / "kpt_test_beside.py").write_text(
        "import torch\n\nclass Net(torch.nn.Linear):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    torch.save(importlib.import_module("kpt_test_beside").Net(2, 2), tmp_path / "net.pt")
    monkeypatch.delitem(sys.modules, "kpt_test_beside")
    sys.path.remove(str(tmp_path))
    call = ("optimize", "--model", "net.pt", "--inputs", "float32[1,2]", "--json")
    assert kpt_cli(*call).json["code"] == "untrusted" and "kpt_test_beside" not in sys.modules
    answer = kpt_cli(*call, "--trust-model")
    assert answer.code == 0, answer.json
    assert type(optimized["model"]).__name__ == "Net"
