"""``kpt plugins list``, ``show``, ``new`` and ``check``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kpt
from kpt import profiles
from kpt.plugins import PluginStatus, Registered, Registry, assembly, registry
from kpt.specs import PassSpec

STATUSES = (
    PluginStatus("good", "kpt-plugin-good", "1.0", hooks=("kpt_passes",)),
    PluginStatus(
        "bad", "kpt-plugin-bad", "2.0", "broken", "it cannot be imported: OSError: x", "pip install bad"
    ),
    PluginStatus("off", "kpt-plugin-off", "3.0", "disabled", "KPT_PLUGINS is empty", "unset KPT_PLUGINS"),
)


@pytest.fixture
def some_plugins(monkeypatch):
    spec = PassSpec("good.pass", "layout", "math:sqrt", modes=("inference", "training"))
    found = Registry(STATUSES, {"kpt_passes": [Registered(spec, "good", "kpt-plugin-good", "1.0")]})
    monkeypatch.setattr("kpt.plugins.registry", lambda *a, **k: found)
    monkeypatch.setattr("kpt.profiles.installed_plugins", lambda *a, **k: found)


def test_list_names_every_plugin_its_state_and_what_mends_it(kpt_cli, some_plugins):
    answer = kpt_cli("plugins", "list")
    assert answer.code == 0
    for text in ("✓", "✗", "good", "passes", "broken", "OSError: x", "pip install bad", "unset KPT_PLUGINS"):
        assert text in answer.out
    listed = kpt_cli("plugins", "list", "--json").json["plugins"]
    assert [entry["state"] for entry in listed] == ["ok", "broken", "disabled"]
    assert listed[1]["mend"] == "pip install bad"


def test_list_without_plugins_says_what_to_install(kpt_cli, monkeypatch):
    monkeypatch.setattr("kpt.profiles.installed_plugins", lambda *a, **k: registry([]))
    monkeypatch.setattr(profiles, "statuses", lambda *a: ())
    assert "pip install kpt-plugin-cpu" in kpt_cli("plugins", "list").out


def test_show_prints_every_spec(kpt_cli, some_plugins):
    answer = kpt_cli("plugins", "show", "good")
    assert "good.pass" in answer.out and "modes=inference|training" in answer.out
    shown = kpt_cli("plugins", "show", "good", "--json").json
    assert shown["specs"]["kpt_passes"][0]["entry"] == "math:sqrt"
    assert "to mend it: pip install bad" in kpt_cli("plugins", "show", "bad").out


def test_show_offers_the_nearest_name(kpt_cli, some_plugins):
    answer = kpt_cli("plugins", "show", "goood", "--json")
    assert answer.code == 1 and "did you mean 'good'?" in answer.json["message"]


@pytest.fixture
def new_plugin(kpt_cli, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    answer = kpt_cli("plugins", "new", "my-things", "--json")
    assert answer.code == 0
    folder = Path(answer.json["folder"])
    assert folder == tmp_path / "kpt-plugin-my-things"
    assert sorted(answer.json["files"]) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )
    return folder


def test_a_new_plugin_loads_and_depends_on_this_core(new_plugin, monkeypatch):
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((new_plugin / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["kpt.plugins"] == {"my-things": "kpt_plugin_my_things.hooks"}
    (core,) = [Requirement(text) for text in project["dependencies"] if text.startswith("kpt-core")]
    assert kpt.__version__ in core.specifier and "99.0" not in core.specifier
    monkeypatch.syspath_prepend(str(new_plugin))
    import kpt_plugin_my_things.hooks as hooks  # type: ignore[import-not-found]

    (status,) = registry([hooks]).statuses[-1:]
    assert status.state == "ok" and set(status.hooks) == {"kpt_kernels", "kpt_passes"}


def test_a_new_plugins_own_tests_pass(new_plugin):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "."],
        cwd=new_plugin,
        env={**__import__("os").environ, "PYTHONPATH": f"{new_plugin}:{Path(kpt.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def test_new_refuses_bad_names_and_existing_folders(kpt_cli, tmp_path):
    assert kpt_cli("plugins", "new", "My Things").code == 2
    (tmp_path / "file").write_text("mine")
    answer = kpt_cli("plugins", "new", "mine", tmp_path)
    assert answer.code == 2 and "not empty" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_prefix_of_a_distribution_is_no_part_of_a_plugins_name(kpt_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = kpt_cli("plugins", "new", "kpt-plugin-mine", "--json")
    assert answer.json["folder"] == str(tmp_path / "kpt-plugin-mine")
    assert 'mine = "kpt_plugin_mine.hooks' in (tmp_path / "kpt-plugin-mine" / "pyproject.toml").read_text()


def write_plugin(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text("import kpt\nfrom kpt.specs import *\n" + source)


@pytest.fixture
def importable(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(kpt.__file__).parents[1]}")
    return tmp_path


def test_check_passes_a_sound_plugin_and_names_what_fails(kpt_cli, importable):
    write_plugin(
        importable,
        "kpt_check_good",
        "@kpt.hookimpl\ndef kpt_exporters():\n    yield ExporterSpec('e', 'kpt_check_good:Exporter', 'txt')\n"
        "class Exporter:\n    def export(self, model, example_inputs, path): return path\n",
    )
    answer = kpt_cli("plugins", "check", "kpt_check_good", "--json")
    assert answer.code == 0 and answer.json["conforms"] is True
    assert {test["test"]: test["state"] for test in answer.json["tests"]}[
        "test_every_reference_imports"
    ] == "passed"

    write_plugin(
        importable,
        "kpt_check_bad",
        "import torch\n@kpt.hookimpl\ndef kpt_exporters():\n"
        "    yield ExporterSpec('e', 'kpt_check_bad:Gone', 'txt')\n",
    )
    answer = kpt_cli("plugins", "check", "kpt_check_bad")
    assert answer.code == 3
    assert "imports torch" in answer.out and "kpt_check_bad:Gone" in answer.out

    write_plugin(importable, "kpt_check_lacking", "import kpt_check_missing\n")
    answer = kpt_cli("plugins", "check", "kpt_check_lacking", "--json")
    assert answer.code == 3 and "No module named" in answer.json["tests"][0]["reason"]


def test_check_survives_a_plugin_that_kills_its_process(kpt_cli, importable):
    write_plugin(importable, "kpt_check_killer", "import os\nos._exit(7)\n")
    answer = kpt_cli("plugins", "check", "kpt_check_killer", "--json")
    assert answer.code == 1 and answer.json["code"] == "crashed" and "7" in answer.json["message"]


def test_the_loader_is_used_without_probes_for_the_registry_alone():
    assert assembly.registry([]) is registry([])


def test_checking_what_is_not_there_names_what_is_near(kpt_cli):
    answer = kpt_cli("plugins", "check", "hugingface", "--json")
    assert (answer.code, answer.json["code"]) == (1, "unknown-plugin")
    assert "did you mean 'huggingface'?" in answer.json["message"]
    assert kpt_cli("plugins", "check", "no_such_module", "--json").json["code"] == "unknown-plugin"
