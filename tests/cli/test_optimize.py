"""``kpt optimize`` on a small model."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import kpt
from kpt.artifact.folder import ArtifactError
from stand_ins import INPUTS


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


def test_without_what_artifacts_are_stored_with_nothing_is_searched(
    kpt_cli, model_file, optimized, tmp_path, monkeypatch
):
    path, arch = model_file
    monkeypatch.setattr("kpt.artifact.folder.missing_packages", lambda: ["safetensors"])
    answer = kpt_cli(
        *("optimize", "--model", path, "--arch", arch, "--inputs", INPUTS, "--out", tmp_path / "x", "--json")
    )
    assert answer.code == 1 and answer.json["code"] == "missing-package" and not optimized
    assert answer.json["hint"] == "To mend it: pip install safetensors"


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
