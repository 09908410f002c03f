"""Detection against topologies in the driver's form, the facts of each architecture, and the tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import topologies
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


@pytest.fixture
def mi300x(tmp_path):
    return topologies.write(tmp_path, topologies.MI300X, topologies.PAIR)


@pytest.mark.parametrize(
    ("chip", "joined", "facts", "first_links"),
    [
        # A package of MI250X is two GPUs, with a half of the units and of the memory each.
        (
            topologies.MI250X,
            topologies.TWO_PACKAGES,
            ("gfx90a", 110, 65_536, 64 * 2**30),
            {2: 200_000, 3: 50_000},
        ),
        (topologies.MI300X, topologies.PAIR, ("gfx942", 304, 65_536, 192 * 2**30), {2: 64_000}),
        (topologies.MI350X, topologies.PAIR, ("gfx950", 256, 163_840, 288 * 2**30), {2: 76_800}),
    ],
    ids=["MI250X", "MI300X", "MI350X"],
)
def test_topologies_are_read(tmp_path, chip, joined, facts, first_links) -> None:
    found = topology.gpus(topologies.write(tmp_path, chip, joined))
    assert [node.number for node in found] == sorted({end for pair in joined for end in pair})
    for node in found:
        assert (node.gfx, node.compute_units, node.lds, node.memory) == facts
        assert node.wavefront == 64
    assert found[0].links == first_links, "PCIe links do not count"
    by_number = {node.number: node for node in found}
    assert all(by_number[other].links[1] == width for other, width in found[0].links.items())


@pytest.mark.parametrize(
    ("chip", "family", "eight_bits"),
    [
        (topologies.MI250X, "MI200", ()),
        (topologies.MI300X, "MI300", ("float8_e4m3fnuz", "float8_e5m2fnuz")),
        (topologies.MI350X, "MI350", ("float8_e4m3fn", "float8_e5m2")),
    ],
    ids=["MI250X", "MI300X", "MI350X"],
)
def test_profiles_of_each_family(tmp_path, chip, family, eight_bits) -> None:
    """What the driver and the table of architectures say agree, and both are in the profile."""
    (node, *_) = nodes = topology.gpus(topologies.write(tmp_path, chip, topologies.PAIR))
    profile = describe(nodes, "7.0.0")
    assert node.lds == KNOWN[node.gfx].lds == profile.caches["lds"]
    assert node.wavefront == KNOWN[node.gfx].wavefront
    assert profile.details["family"].startswith(family)
    assert tuple(name for name in profile.native_dtypes if "float8" in name) == eight_bits
    assert ("mfma" in profile.features) and profile.compute_units == chip.units


@pytest.mark.parametrize(
    ("version", "name"), [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110000, "gfx1100")]
)
def test_gfx_names(version, name) -> None:
    assert topology.gfx_name(version) == name


def test_a_broken_topology_is_no_gpu(tmp_path) -> None:
    assert topology.gpus(tmp_path / "absent") == []
    topologies.write_node(tmp_path, 0, {})
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
    state = {"enabled": False, "tuning": True, "record": False, "file": "mine.csv", "results": []}
    offered = set(torch.cuda.tunable.__all__)
    fake = SimpleNamespace(
        is_enabled=lambda: state["enabled"],
        enable=lambda on=True: state.update(enabled=on),
        tuning_is_enabled=lambda: state["tuning"],
        tuning_enable=lambda on=True: state.update(tuning=on),
        record_untuned_is_enabled=lambda: state["record"],
        record_untuned_enable=lambda on=True: state.update(record=on),
        get_filename=lambda: state["file"],
        set_filename=lambda name, insert_device_ordinal=False: state.update(file=name),
        get_results=lambda: state["results"],
    )
    assert set(vars(fake)) <= offered, "the stand-in has what this torch has, and nothing else"
    monkeypatch.setattr(torch.cuda, "tunable", fake)
    subject = tunable.TunableGemm()
    (variant,) = subject.propose(None, SimpleNamespace(vendor="amd"))
    before = dict(state)
    undo = subject.apply(torch.nn.Linear(2, 2), variant)
    assert state["enabled"] and state["tuning"]
    assert state["file"] == os.devnull, "what a trial finds is written nowhere"
    assert not subject.verify_applied(torch.nn.Linear(2, 2)), "nothing was tuned"
    state["results"] = [("gemm", "1", "solution", 0.1)]
    assert subject.verify_applied(torch.nn.Linear(2, 2))
    assert not state["tuning"], "after the warm-up no shape is tuned any more"
    undo()
    assert state == {**before, "results": state["results"]}
    (skip,) = subject.propose(None, SimpleNamespace(vendor="nvidia"))
    assert "not AMD" in skip.reason


@pytest.mark.parametrize("name", KNOWN)
def test_every_architecture_has_a_table_that_says_it_is_computed(name) -> None:
    table = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    assert table["architecture"] == name and table["measured"] is False
    assert table["kernels"], "an empty table decides nothing"
