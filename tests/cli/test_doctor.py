"""``kpt doctor``: every fault is named with a command that mends it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import kpt
from kpt.cli import findings
from kpt.cli.findings import Finding
from kpt.plugins import clear_cache

PLUGIN = "import kpt\nfrom kpt.specs import *\n"


def marks(found: list[Finding]) -> list[str]:
    return [finding.mark for finding in found]


def install(site: Path, name: str, source: str, requires: str = "kpt-core>=0.1") -> None:
    """A real distribution with a plugin in it."""
    module = f"kpt_plugin_{name}"
    (site / f"{module}.py").write_text(PLUGIN + source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kpt-plugin-{name}\nVersion: 1.0\nRequires-Dist: {requires}\n\n"
    )
    (info / "entry_points.txt").write_text(f"[kpt.plugins]\n{name} = {module}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    clear_cache()
    yield folder
    clear_cache()
    for name in [name for name in sys.modules if name.startswith("kpt_plugin_doctor_")]:
        del sys.modules[name]


def test_every_broken_plugin_is_named_and_the_good_one_works(kpt_cli, site):
    hook = "@kpt.hookimpl\ndef kpt_passes():\n    "
    install(site, "doctor_good", hook + "return [PassSpec('doctor.good', 'layout', 'math:sqrt')]")
    broken = {
        "doctor_raises": "raise RuntimeError('boom')",
        "doctor_exits": "raise SystemExit(3)",
        "doctor_library": "import ctypes; ctypes.CDLL('libnot-there-42.so')",
        "doctor_misspelt": "@kpt.hookimpl\ndef kpt_pases(): return []",
        "doctor_signature": "@kpt.hookimpl\ndef kpt_passes(model): return []",
        "doctor_duplicate": hook + "return [PassSpec('doctor.good', 'layout', 'math:sqrt')]",
        "doctor_hook": hook + "raise OSError('libgone.so')",
        "doctor_type": hook + "return ['not a spec']",
    }
    for name, source in broken.items():
        install(site, name, source)
    install(site, "doctor_future", "", requires="kpt-core>=99")
    answer = kpt_cli("doctor", "--json")
    assert answer.code == 3 and answer.json["healthy"] is False
    found = answer.json["areas"]["plugins"]
    for name in (*broken, "doctor_future"):
        # Names that are sorted before "good" win its spec, so the duplicate may be either of the two.
        if name == "doctor_duplicate":
            continue
        (entry,) = [entry for entry in found if entry["text"].startswith(f"{name} ")]
        assert entry["mark"] == "fault" and entry["mend"].startswith(("pip ", "export ")), entry
    conflict = [entry for entry in found if "is conflict" in entry["text"]]
    assert (
        len(conflict) == 1
        and "doctor-good" in conflict[0]["text"]
        and "doctor-duplicate" in conflict[0]["text"]
    )
    text = kpt_cli("doctor").out
    assert "RuntimeError: boom" in text and "To paste into an issue" in text and "✗" in text


def test_a_healthy_installation_exits_with_zero(kpt_cli, monkeypatch):
    monkeypatch.setattr(
        findings, "AREAS", {"core": lambda: [Finding("ok", "fine")], "x": lambda: [Finding("note", "n")]}
    )
    answer = kpt_cli("doctor", "--json")
    assert answer.code == 0 and answer.json["healthy"] is True
    assert answer.json["report"].splitlines() == ["core     ✓ fine", "x        ! n"]


def test_packages_that_models_are_stored_with_are_looked_for(monkeypatch):
    monkeypatch.setattr("kpt.artifact.folder.missing_packages", lambda: ["safetensors"])
    (fault,) = [finding for finding in findings.torch() if finding.mark == "fault"]
    assert fault.text.startswith("safetensors is not installed") and fault.mend == "pip install safetensors"


def test_a_cache_that_cannot_be_made_is_a_fault(tmp_path, monkeypatch):
    """Otherwise every process searches again, and nobody is told why."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "sealed").mkdir()
    writable = os.access
    monkeypatch.setattr(
        "os.access", lambda place, mode: Path(place).name != "sealed" and writable(place, mode)
    )
    for inside, reason in (("file", "is not a folder"), ("sealed", "is not writable")):
        monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / inside / "a" / "b"))
        (fault,) = findings.cache()
        assert fault.mark == "fault" and fault.text.endswith(f"{tmp_path / inside} {reason}.")
        assert fault.mend.startswith("export KPT_CACHE_DIR=")
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert marks(findings.cache()) == ["ok"]


def test_an_area_that_fails_is_a_finding(kpt_cli, monkeypatch):
    def fails():
        raise SystemExit(9)
        yield

    monkeypatch.setattr(findings, "AREAS", {"core": fails, "x": lambda: [Finding("ok", "fine")]})
    answer = kpt_cli("doctor", "--json")
    assert answer.code == 3
    assert "SystemExit: 9" in answer.json["areas"]["core"][0]["text"]
    assert answer.json["areas"]["x"][0]["text"] == "fine"


def test_a_foreign_package_called_kpt_is_found(site, monkeypatch):
    package = site / "kpt"
    package.mkdir()
    (package / "__init__.py").write_text("")
    info = site / "kpt-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kpt\nVersion: 3.0\n\n")
    (info / "RECORD").write_text("kpt/__init__.py,,\n")
    (info / "top_level.txt").write_text("kpt\n")
    faults = [finding for finding in findings.core() if finding.mark == "fault"]
    assert any(
        "distribution kpt is not ours" in fault.text and "pip uninstall kpt" in fault.mend for fault in faults
    )
    assert any(str(package) in fault.text and fault.mend.startswith("mv ") for fault in faults)


def test_a_foreign_program_on_the_path_is_found(tmp_path, monkeypatch):
    foreign, other = tmp_path / "foreign", tmp_path / "other"
    for folder, content in (
        (foreign, "#!/bin/sh\necho not ours\n"),
        (other, "from kpt.cli.main import main\n"),
    ):
        folder.mkdir()
        program = folder / "kpt"
        program.write_text(content)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{foreign}{os.pathsep}{other}")
    first, *missing = findings.path()
    assert first.mark == "fault" and "is not ours" in first.text
    # kernelpytorch is not on this PATH either: the alias names something that exists.
    *_, target = shlex.split(first.mend)[1].partition("=")
    done = subprocess.run([*shlex.split(target), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"kpt {kpt.__version__}"
    (other / "kernelpytorch").write_text("from kpt.cli.main import main\n")
    (other / "kernelpytorch").chmod(0o755)
    assert next(iter(findings.path())).mend == "alias kpt=kernelpytorch"
    (other / "kernelpytorch").unlink()
    assert marks(missing) == ["note", "note"] and all("export PATH=" in finding.mend for finding in missing)
    monkeypatch.setenv("PATH", str(other))
    assert next(iter(findings.path())).text.startswith("kpt is that of another environment")


def test_the_cache_is_examined(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    assert [finding.text for finding in findings.cache()] == ["no cache yet"]
    (tmp_path / "cache" / "hardware").mkdir(parents=True, mode=0o700)
    (tmp_path / "cache").chmod(0o700)
    assert marks(list(findings.cache())) == ["ok"]
    (tmp_path / "cache" / "hardware").chmod(0o777)
    faults = [finding for finding in findings.cache() if finding.mark == "fault"]
    assert (
        len(faults) == 1 and "written to by others" in faults[0].text and faults[0].mend.startswith("rm -r")
    )


def test_a_missing_torch_is_a_fault_with_its_mend(monkeypatch):
    monkeypatch.setattr(findings, "find_spec", lambda name: None)
    assert list(findings.torch()) == [Finding("fault", "PyTorch is not installed", "pip install torch")]


def test_an_untested_torch_and_a_missing_compiler_are_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "1.9.0+cpu")
    monkeypatch.setenv("CXX", "no-such-compiler-42")
    found = list(findings.torch())
    assert marks(found) == ["fault", "note"]
    assert "torch 1.9.0+cpu is not tested" in found[0].text and "torch>=2.11" in found[0].mend
    assert "no-such-compiler-42" in found[1].text


def test_replaced_hardware_is_noted(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    path.write_text('{"name": "Recorded", "device_type": "cpu"}')
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", str(path))
    assert any("replaces the real hardware" in finding.text for finding in findings.hardware())


def test_the_report_does_not_name_the_user(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert findings._short(Path("/home/somebody/.cache/kpt")) == "~/.cache/kpt"


@pytest.mark.parametrize("content", [None, "{bad", '{"name": "x"}'])
def test_a_replacement_of_the_hardware_that_cannot_be_read_is_a_fault(tmp_path, monkeypatch, content):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", str(path))
    first = next(iter(findings.hardware()))
    assert (first.mark, first.mend) == ("fault", "unset KPT_OVERRIDE_HARDWARE")
    assert "KPT_OVERRIDE_HARDWARE" in first.text and str(path) in first.text
    monkeypatch.setenv("KPT_PLUGINS", "")
    clear_cache()
    assert marks(list(findings.hardware())) == ["fault", "note"]
