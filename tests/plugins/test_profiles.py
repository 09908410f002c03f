"""Hardware profiles: detection in isolation, measured once, kept privately, faked on request."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import kpt
from kpt import profiles, user_cache
from kpt.plugins import PluginError, registry
from kpt.specs import HardwareProfile, HardwareSpec

MEASURED: list[str] = []


class CpuProbe:
    def detect(self):
        return HardwareProfile(
            name="test cpu", device_type="cpu", compute_units=3, native_dtypes=("float32",)
        )

    def measure(self, profile):
        from dataclasses import replace

        MEASURED.append(profile.name)
        return replace(profile, bandwidth=1e9, matmul_rates={"float32": 2e9})


class FastProbe(CpuProbe):
    def detect(self):
        return HardwareProfile(name="fast one", device_type="xpu")


class AbsentProbe:
    def detect(self):
        return "no such bus"


class RaisingProbe:
    def detect(self):
        raise SystemExit("driver")


class WrongProbe:
    def detect(self):
        return {"name": "a dict"}


class CannotMeasure(CpuProbe):
    def measure(self, profile):
        raise OSError("no permission")


def plugins_with(*named: tuple[str, str, type, int]):
    """A registry with one plugin a probe: (name, device type, probe, priority)."""
    sys.modules.setdefault("kpt_test_profiles", sys.modules[__name__])

    def plugin(name, kind, probe, priority):
        class Plugin:
            @kpt.hookimpl
            def kpt_hardware(self):
                yield HardwareSpec(name, kind, f"kpt_test_profiles:{probe.__name__}", priority)

        Plugin.__name__ = name
        return Plugin()

    return registry([plugin(*entry) for entry in named])


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KPT_OVERRIDE_HARDWARE", raising=False)
    monkeypatch.setattr(profiles, "_measured", {})
    MEASURED.clear()


def new_process(monkeypatch):
    """Forget what this process remembers; the cache folder stays."""
    monkeypatch.setattr(profiles, "_measured", {})


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does: rates measured on a busy one are not kept."""
    monkeypatch.setattr("kpt.profiles._busy", lambda: False)


def test_rates_of_a_busy_machine_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from kpt import profiles

    monkeypatch.undo()
    monkeypatch.setattr(os, "getloadavg", lambda: (1e6, 0.0, 0.0), raising=False)
    assert profiles._busy()
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0), raising=False)
    assert not profiles._busy()


def test_the_device_is_chosen_by_type_or_by_priority():
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0), ("fast", "xpu", FastProbe, 10))
    assert kpt.hardware(measure=False, registry=plugins).name == "fast one"
    assert kpt.hardware("cpu", measure=False, registry=plugins).name == "test cpu"
    assert kpt.hardware("xpu:1", measure=False, registry=plugins).name == "fast one"


def test_an_absent_or_broken_device_costs_nothing_else():
    plugins = plugins_with(
        ("absent", "xpu", AbsentProbe, 30),
        ("raising", "hpu", RaisingProbe, 20),
        ("wrong", "mtia", WrongProbe, 10),
        ("cpu", "cpu", CpuProbe, 0),
    )
    assert kpt.hardware(measure=False, registry=plugins).name == "test cpu"
    with pytest.raises(PluginError, match="There is no 'xpu' device: no such bus"):
        kpt.hardware("xpu", registry=plugins)
    assert "SystemExit: driver" in kpt.hardware("hpu", registry=plugins).details["reason"]
    states = {
        status.name.removeprefix("inline:"): status
        for status in profiles.statuses(plugins)
        if status.name.startswith("inline:")  # plugins that are installed here were not selected
    }
    assert {name: status.state for name, status in states.items()} == {
        "absent": "hardware-absent",
        "raising": "broken",
        "wrong": "broken",
        "cpu": "ok",
    }
    assert states["absent"].reason == "no such bus" and states["absent"].mend
    assert "expected a HardwareProfile" in states["wrong"].reason


class AnyProbe(CpuProbe):
    """Says what a test lets it say."""

    said: dict = {}
    measured: dict = {}

    def detect(self):
        return HardwareProfile(**{"name": "any", "device_type": "cpu", **self.said})

    def measure(self, profile):
        return HardwareProfile(**{"name": "any", "device_type": "cpu", **self.measured})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"name": 3}, "the field name is 3"),
        ({"device_type": None}, "device_type is missing"),
        ({"device_type": "cuda"}, "of a cuda device; its spec says cpu"),
        ({"bandwidth": float("nan")}, "the field bandwidth is nan"),
        ({"matmul_rates": {"float32": -1.0}}, "the field matmul_rates"),
        ({"native_dtypes": None}, "the field native_dtypes is None"),
        ({"compute_units": "two"}, "the field compute_units is 'two'"),
    ],
)
def test_a_profile_that_nobody_can_compute_with_breaks_its_own_probe_only(monkeypatch, said, reason, caplog):
    plugins = plugins_with(("any", "cpu", AnyProbe, 30), ("cpu", "cpu", CpuProbe, 0))
    monkeypatch.setattr(AnyProbe, "measured", said)
    assert kpt.hardware(registry=plugins).name == "any"  # what it detects is right, so it is used, unmeasured
    assert reason in kpt.hardware(registry=plugins).details["unmeasured"]
    assert reason in caplog.text
    monkeypatch.setattr(AnyProbe, "said", said)
    assert kpt.hardware(registry=plugins).name == "test cpu"
    (broken,) = [status for status in profiles.statuses(plugins) if status.state == "broken"]
    assert broken.name == "inline:any" and reason in broken.reason


def test_who_looked_for_a_device_when_ctrl_c_came_is_named(monkeypatch, caplog):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnyProbe, "detect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kpt.hardware(registry=plugins_with(("any", "cpu", AnyProbe, 0)))
    assert "Interrupted while inline:any looked for its device" in caplog.text


def test_without_a_plugin_the_profile_is_honest():
    profile = kpt.hardware("cpu", registry=registry([]))
    assert profile.name.startswith("unknown") and profile.compute_units >= 1
    assert profile.bandwidth == 0.0 and not profile.matmul_rates
    assert "no plugin in use" in profile.details["reason"]
    with pytest.raises(PluginError, match="not a device"):
        kpt.hardware("no such device", registry=registry([]))


def test_rates_are_measured_once_and_remembered(monkeypatch):
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0))
    assert kpt.hardware(measure=False, registry=plugins).bandwidth == 0.0
    first = kpt.hardware(registry=plugins)
    assert first.bandwidth == 1e9 and kpt.hardware(registry=plugins) == first
    new_process(monkeypatch)
    assert kpt.hardware(registry=plugins) == first
    assert kpt.hardware(measure=False, registry=plugins) == first
    assert MEASURED == ["test cpu"]


def test_other_processors_are_measured_anew(monkeypatch):
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0))
    kpt.hardware(registry=plugins)
    new_process(monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    kpt.hardware(registry=plugins)
    assert len(MEASURED) == 2


def test_a_probe_that_cannot_measure_says_so(caplog):
    plugins = plugins_with(("cpu", "cpu", CannotMeasure, 0))
    profile = kpt.hardware(registry=plugins)
    assert profile.bandwidth == 0.0 and profile.details["unmeasured"] == "OSError: no permission"
    assert "no permission" in caplog.text


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache" / "hardware").glob("*.json")
    return path


def test_the_cache_is_private_json(tmp_path):
    kpt.hardware(registry=plugins_with(("cpu", "cpu", CpuProbe, 0)))
    path = cache_file(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert json.loads(path.read_text())["matmul_rates"] == {"float32": 2e9}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"name": "x", "device_type": "cpu", "bandwidth": -1}',
        '{"name": "x", "device_type": "cpu", "bandwidth": "fast"}',
        '{"name": "x", "device_type": "cpu", "run": "rm"}',
    ],
)
def test_a_tampered_cache_is_measured_anew(tmp_path, monkeypatch, caplog, content):
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0))
    kpt.hardware(registry=plugins)
    path = cache_file(tmp_path)
    path.write_text(content)
    new_process(monkeypatch)
    assert kpt.hardware(registry=plugins).bandwidth == 1e9
    assert len(MEASURED) == 2 and "not taken from the cache" in caplog.text


def test_a_linked_or_writable_or_foreign_cache_is_refused(tmp_path, monkeypatch, caplog):
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "cache").symlink_to(elsewhere)
    assert kpt.hardware(registry=plugins).bandwidth == 1e9
    assert "symbolic link" in caplog.text and not list(elsewhere.iterdir())

    (tmp_path / "cache").unlink()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(user_cache.CacheError, match="written to by others"):
        user_cache.folder("hardware")

    (tmp_path / "cache").chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4242424)
    with pytest.raises(user_cache.CacheError, match="belongs to another user"):
        user_cache.folder("hardware")


def test_a_cache_file_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    folder = user_cache.folder("hardware")
    (tmp_path / "real.json").write_text("{}")
    (folder / "link.json").symlink_to(tmp_path / "real.json")
    os.mkfifo(folder / "pipe.json")
    for name in ("link.json", "pipe.json"):
        with pytest.raises(user_cache.CacheError):
            user_cache.read_json(folder / name)
    assert user_cache.read_json(folder / "missing.json") is None


def test_a_recorded_profile_replaces_the_real_one(tmp_path, monkeypatch):
    plugins = plugins_with(("cpu", "cpu", CpuProbe, 0))
    recorded = HardwareProfile(
        name="recorded",
        device_type="cuda",
        bandwidth=4e12,
        native_dtypes=("float8_e4m3fn",),
        caches={"l2": 5},
    )
    path = tmp_path / "recorded.json"
    path.write_text(json.dumps(profiles.to_dict(recorded)))
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", str(path))
    assert kpt.hardware(registry=plugins) == recorded
    assert kpt.hardware("cuda:0", registry=plugins) == recorded
    assert kpt.hardware("cpu", registry=plugins).name == "test cpu"


def test_a_profile_that_a_plugin_ships_is_found_by_name(install, tmp_path, monkeypatch):
    install(
        "kpt-plugin-shipping",
        "@kpt.hookimpl\ndef kpt_hardware():\n    yield HardwareSpec('s', 'xpu', 'shipping.probe:Probe')",
        plugin="shipping",
    )
    package = tmp_path / "site" / "shipping"
    (package / "profiles").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not needed')")
    (package / "profiles" / "big.json").write_text('{"name": "Big", "device_type": "xpu"}')
    (package / "profiles" / "torn.json").write_text('{"name": "Big"}')
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", "big")
    assert kpt.hardware().name == "Big"
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", "small")
    with pytest.raises(PluginError, match="known are big, torn") as caught:
        kpt.hardware()
    assert caught.value.mend == "unset KPT_OVERRIDE_HARDWARE"
    monkeypatch.setenv("KPT_OVERRIDE_HARDWARE", "torn")
    with pytest.raises(PluginError, match="the field device_type is missing"):
        kpt.hardware()


def test_a_profile_survives_json():
    profile = HardwareProfile("n", "cpu", features=("a",), caches={"l1": 1}, details={"x": [1, None]})
    assert profiles.from_dict(json.loads(json.dumps(profiles.to_dict(profile)))) == profile
