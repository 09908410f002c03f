"""Plugins that hang, or that end the process that loads them: named, with the way to do without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kpt.cli import rehearsal
from kpt.plugins import clear_cache

PROBE = """
import kpt
from kpt.specs import HardwareSpec

@kpt.hookimpl
def kpt_hardware():
    return [HardwareSpec("{name}", "cpu", "kpt_plugin_{name}:Probe")]

class Probe:
    def detect(self):
        {detect}
"""
WAITS = "import time; time.sleep(600)"


def install(site, name, source):
    (site / f"kpt_plugin_{name}.py").write_text(source)
    info = site / f"kpt_plugin_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kpt-plugin-{name}\nVersion: 1.0\n\n")
    (info / "entry_points.txt").write_text(f"[kpt.plugins]\n{name} = kpt_plugin_{name}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rehearsal, "PATIENCE", 3.0)
    clear_cache()
    yield tmp_path
    clear_cache()
    for name in [name for name in sys.modules if name.startswith("kpt_plugin_hostile_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (WAITS, "its import or a hook did not come to an end within 3 s"),
        (PROBE.format(name="hostile_odd", detect=WAITS), "kpt_hardware: its probe did not come to an end"),
        # In native code, which no exception in the thread reaches.
        (
            "import ctypes; ctypes.PyDLL(None).pause()",
            "its import or a hook did not come to an end within 3 s",
        ),
        ("input('Your licence key: ')", "its import or a hook did not come to an end within 3 s"),
        ("import os; os._exit(7)", "its import or a hook ended the process, with status 7"),
        (PROBE.format(name="hostile_odd", detect="import os; os.abort()"), "with status -6"),
    ],
    ids=["waits", "waits in its probe", "waits in C", "asks", "exits", "aborts in its probe"],
)
def test_a_plugin_that_never_answers_is_named_with_the_way_to_do_without(
    kpt_cli, site, monkeypatch, source, reason
):
    install(site, "hostile_odd", source)
    install(site, "hostile_zeal", PROBE.format(name="hostile_zeal", detect="return 'there is none'"))
    monkeypatch.setenv("KPT_PLUGINS", "hostile_odd hostile_zeal")
    listed = {entry["name"]: entry for entry in kpt_cli("plugins", "list", "--json").json["plugins"]}
    assert listed["hostile_odd"]["state"] == "broken" and reason in listed["hostile_odd"]["reason"]
    assert listed["hostile_odd"]["mend"] == "export KPT_DISABLE_PLUGINS=hostile_odd"
    assert listed["hostile_zeal"]["state"] == "hardware-absent"
    assert "kpt_plugin_hostile_odd" not in sys.modules
    areas = kpt_cli("doctor", "--json").json["areas"]
    (finding,) = [entry for entry in areas["plugins"] if entry["text"].startswith("hostile_odd ")]
    assert finding["mark"] == "fault" and reason in finding["text"]
    assert finding["mend"] == "export KPT_DISABLE_PLUGINS=hostile_odd"
    assert any("there is none" in entry["text"] for entry in areas["hardware"])
    assert reason in kpt_cli("plugins", "show", "hostile_odd").out


def test_others_keep_their_own_reasons_beside_one_that_hangs(kpt_cli, site, monkeypatch):
    """Those that may not be imported are left out with it, and for another reason."""
    install(site, "hostile_odd", WAITS)
    install(site, "hostile_new", "raise SystemExit")
    metadata = site / "kpt_plugin_hostile_new-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().strip() + "\nRequires-Dist: kpt-core>=9\n\n")
    monkeypatch.setenv("KPT_PLUGINS", "hostile_odd hostile_new")
    listed = {entry["name"]: entry for entry in kpt_cli("plugins", "list", "--json").json["plugins"]}
    assert listed["hostile_odd"]["state"] == "broken"
    assert listed["hostile_new"]["state"] == "incompatible"
    assert "pip install 'kpt-core>=9'" in listed["hostile_new"]["mend"]
    assert "KPT_PLUGINS does not name it" in listed["cpu"]["reason"]


def test_what_a_plugin_that_hangs_had_started_ends_with_it(kpt_cli, site, monkeypatch, tmp_path):
    started = tmp_path / "started"
    install(
        site,
        "hostile_parent",
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {WAITS!r}])\n"
        f"open({str(started)!r}, 'w').write(str(child.pid))\nchild.wait()\n",
    )
    monkeypatch.setenv("KPT_PLUGINS", "hostile_parent")
    assert kpt_cli("plugins", "list", "--json").json["plugins"]
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", started.read_text()], capture_output=True, text=True, check=False
    ).stdout.strip()
    assert state == "" or state.startswith("Z")


def test_without_a_process_to_load_in_it_says_so(kpt_cli, site, monkeypatch):
    install(site, "hostile_odd", "")
    monkeypatch.setenv("KPT_PLUGINS", "hostile_odd")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    answer = kpt_cli("plugins", "list", "--json")
    assert (
        answer.code == 1
        and "/bin/false cannot load plugins in a process of their own" in answer.json["message"]
    )
