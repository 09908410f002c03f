"""Detection against recorded topologies, the facts of each architecture, and the tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kpt_plugin_rocm.plugin
import kpt_plugin_rocm.tables
from kpt.plugins import registry
from kpt.profiles import hardware
from kpt.testing import PluginSuite
from kpt_plugin_rocm import topology, tunable
from kpt_plugin_rocm.architectures import KNOWN, architecture
from kpt_plugin_rocm.probe import RocmProbe, describe

TABLES = Path(kpt_plugin_rocm.tables.__file__).parent


class TestPlugin(PluginSuite):
    plugin = kpt_plugin_rocm.plugin


def write_node(root: Path, number: int, facts: dict[str, int], links=(), banks=()) -> None:
    node = root / str(number)
    node.mkdir(parents=True)
    (node / "properties").write_text("".join(f"{name} {value}\n" for name, value in facts.items()))
    for index, link in enumerate(links):
        folder = node / "io_links" / str(index)
        folder.mkdir(parents=True)
        (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in link.items()))
    for index, size in enumerate(banks):
        folder = node / "mem_banks" / str(index)
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"heap_type 1\nsize_in_bytes {size}\n")


@pytest.fixture
def mi300x(tmp_path):
    """A CPU and two MI300X joined by XGMI, in the form of the driver's files."""
    write_node(tmp_path, 0, {"cpu_cores_count": 96, "simd_count": 0, "gfx_target_version": 0})
    for number, other in ((1, 2), (2, 1)):
        facts = {
            "cpu_cores_count": 0,
            "simd_count": 1216,
            "simd_per_cu": 4,
            "wave_front_size": 64,
            "lds_size_in_kb": 64,
            "gfx_target_version": 90402,
        }
        links = [
            {"type": 2, "node_from": number, "node_to": 0, "max_bandwidth": 64000},
            {"type": 11, "node_from": number, "node_to": other, "max_bandwidth": 64000},
        ]
        write_node(tmp_path, number, facts, links, banks=[206158430208])
    return tmp_path


def test_a_recorded_topology_is_read(mi300x) -> None:
    first, second = topology.gpus(mi300x)
    assert (first.gfx, first.compute_units, first.wavefront, first.lds) == ("gfx942", 304, 64, 65536)
    assert first.memory == 206158430208
    assert first.links == {2: 64000}, "PCIe links do not count"
    assert second.links == {1: 64000}


@pytest.mark.parametrize(
    ("version", "name"), [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110000, "gfx1100")]
)
def test_gfx_names(version, name) -> None:
    assert topology.gfx_name(version) == name


def test_a_broken_topology_is_no_gpu(tmp_path) -> None:
    assert topology.gpus(tmp_path / "absent") == []
    write_node(tmp_path, 0, {})
    (tmp_path / "0" / "properties").write_text("simd_count many\ngfx_target_version\n")
    (tmp_path / "notes").mkdir()
    assert topology.gpus(tmp_path) == []


def test_the_profile_tells_the_fp8_flavours_apart(mi300x) -> None:
    profile = describe(topology.gpus(mi300x), "7.0.0")
    assert profile.vendor == "amd" and profile.device_type == "cuda" and profile.architecture == "gfx942"
    assert "float8_e4m3fnuz" in profile.native_dtypes and "float8_e4m3fn" not in profile.native_dtypes
    assert profile.triton_target == "hip:gfx942:64"
    assert profile.links == {"2": "xgmi 64000 MB/s"}
    assert architecture("gfx950").fp8_dtypes == ("float8_e4m3fn", "float8_e5m2")
    assert architecture("gfx90a:sramecc+:xnack-").fp8_dtypes == ()
    stranger = architecture("gfx9999", wavefront=32, lds=1024)
    assert (stranger.wavefront, stranger.lds, stranger.fp8) == (32, 1024, None)


def test_detection_needs_a_rocm_build_and_a_driver(monkeypatch, mi300x, tmp_path) -> None:
    monkeypatch.setattr(topology, "TOPOLOGY", mi300x)
    said = RocmProbe().detect()
    assert isinstance(said, str) and "torch.version.hip" in said
    monkeypatch.setattr(torch.version, "hip", "7.0.0")
    monkeypatch.setattr(topology.gpus, "__defaults__", (mi300x,))
    found = RocmProbe().detect()
    assert found.compute_units == 304 and found.details["devices"] == 2
    monkeypatch.setattr(topology.gpus, "__defaults__", (tmp_path / "none",))
    assert "lists no GPU" in RocmProbe().detect()


def test_the_build_is_read_without_importing_torch(monkeypatch, tmp_path) -> None:
    from kpt_plugin_rocm import probe

    def version_of(text: str) -> str | None:
        (tmp_path / "version.py").write_text(text)
        monkeypatch.setattr(probe, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "x.py")))
        monkeypatch.setattr(probe.sys, "modules", {})
        return probe.hip_version()

    assert version_of("cuda: Optional[str] = None\nhip: Optional[str] = '7.0.51831'\n") == "7.0.51831"
    assert version_of("cuda = '13.0'\nhip: Optional[str] = None\n") is None
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    assert probe.hip_version() is None


def test_a_gpu_that_torch_uses_and_no_plugin_describes_is_unknown_not_absent(monkeypatch) -> None:
    """With only this plugin installed, an NVIDIA GPU must not become an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    profile = hardware("cuda", measure=False, registry=registry(["rocm"]))
    assert profile.device_type == "cuda" and profile.name.startswith("unknown")


def test_tunable_gemm_switches_back(monkeypatch) -> None:
    state = {"enabled": False, "tuning": True, "record": False, "file": True, "results": []}
    fake = SimpleNamespace(
        is_enabled=lambda: state["enabled"],
        enable=lambda on=True: state.update(enabled=on),
        tuning_is_enabled=lambda: state["tuning"],
        tuning_enable=lambda on=True: state.update(tuning=on),
        record_untuned_is_enabled=lambda: state["record"],
        record_untuned_enable=lambda on=True: state.update(record=on),
        write_file_on_exit=lambda on: state.update(file=on),
        get_results=lambda: state["results"],
    )
    monkeypatch.setattr(torch.cuda, "tunable", fake)
    subject = tunable.TunableGemm()
    (variant,) = subject.propose(None, SimpleNamespace(vendor="amd"))
    before = dict(state)
    undo = subject.apply(torch.nn.Linear(2, 2), variant)
    assert state["enabled"] and state["tuning"]
    assert not subject.verify_applied(torch.nn.Linear(2, 2)), "nothing was tuned"
    state["results"] = [("gemm", "1", "solution", 0.1)]
    assert subject.verify_applied(torch.nn.Linear(2, 2))
    assert not state["tuning"], "after the warm-up no shape is tuned any more"
    undo()
    assert (state["enabled"], state["tuning"]) == (before["enabled"], before["tuning"])
    (skip,) = subject.propose(None, SimpleNamespace(vendor="nvidia"))
    assert "not AMD" in skip.reason


@pytest.mark.parametrize("name", KNOWN)
def test_every_architecture_has_a_table_that_says_it_is_computed(name) -> None:
    table = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    assert table["architecture"] == name and table["measured"] is False
    assert table["kernels"], "an empty table decides nothing"
