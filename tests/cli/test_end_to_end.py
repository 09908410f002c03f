"""``kpt optimize`` and ``bench`` on a small model, with nothing in place of the transaction or of peers."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import kpt

pytest.importorskip("kpt_plugin_cpu")


@pytest.fixture
def slow_file(tmp_path, monkeypatch):
    """(weights, ``--arch``) of a small network that compilers and captured graphs make faster."""
    (tmp_path / "made_for_cli.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.ReLU())]\n"
        "    return nn.Sequential(*layers).eval()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    torch.manual_seed(0)
    model = importlib.import_module("made_for_cli").build()
    torch.save(model.state_dict(), tmp_path / "slow.pt")
    yield tmp_path / "slow.pt", "made_for_cli:build", model
    sys.modules.pop("made_for_cli")


@pytest.mark.slow
def test_from_a_model_file_to_an_artifact_that_loads(kpt_cli, slow_file, tmp_path):
    """Nothing stands in for anything: search, commit, artifact, load."""
    path, arch, model = slow_file
    folder, x = tmp_path / "artifact", torch.randn(4, 16)
    options = ("--arch", arch, "--inputs", "float32[4,16]", "--level", "exact", "--budget", "60")
    answer = kpt_cli("optimize", "--model", path, *options, "--plugins", "cpu", "--out", folder, "--json")
    assert answer.code == 0, answer.err
    found = answer.json["receipt"]
    assert found["searched"] and found["optimized"] and found["speedup_low"] > 1.0, found["rejected"]
    names = [entry["name"] for entry in found["accepted"]]
    assert names
    shown = kpt_cli("explain", folder)
    assert shown.code == 0 and names[0] in shown.out and "recognised: 12 × linear" in shown.out
    assert f"kpt.load({str(folder)!r}, arch={arch!r})" in answer.err, "the line to load it by"
    loaded = kpt.load(folder, arch=arch, plugins=["cpu"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    receipt = kpt.report(loaded)
    assert [entry.name for entry in receipt.accepted] == names
    assert receipt.calls["optimized"] == 1


@pytest.mark.slow
def test_bench_times_a_model_under_real_peers(kpt_cli, slow_file):
    path, arch, _ = slow_file
    options = ("--arch", arch, "--inputs", "float32[4,16]", "--level", "exact", "--budget", "60")
    peers = ("--contenders", "kpt,torch.compile", "--seconds", "2", "--plugins", "cpu", "--json")
    answer = kpt_cli("bench", "--model", path, *options, *peers)
    assert answer.code == 0, answer.err
    by_entrant = {entry["name"]: entry for entry in answer.json["contenders"]}
    assert list(by_entrant) == ["eager", "kpt", "torch.compile"]
    for entry in by_entrant.values():
        assert entry["state"] == "ran" and entry["seconds"] > 0 and entry["error"] < 1e-4, entry
    assert by_entrant["eager"]["ratio"] == 1.0
    assert by_entrant["kpt"]["ratio_low"] > 1.0 and "faster" in by_entrant["kpt"]["note"]
