"""Model files that execute code are refused without trust, and damaged ones are named."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kpt.modelfiles import ModelFileError, load_model
from kpt.modelfiles.pickles import inspect, sha256
from saved_models import ARCH, code_of, same

pytestmark = pytest.mark.usefixtures("architectures")


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_model_beside_other_things_of_a_checkpoint_is_found(tmp_path, model):
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": model}, path)
    assert code_of(path) == "untrusted"
    said: list[str] = []
    loaded = load_model(path, trust=True, notice=said.append)
    assert loaded.kind == "pickle" and same(loaded.model, model)
    assert any("'model'" in line for line in said)


def test_a_pickled_model_needs_trust_and_is_announced(tmp_path, model):
    path = tmp_path / "whole.pt"
    torch.save(model, path)
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert caught.value.code == "untrusted" and "--trust-model" in caught.value.hint
    assert sha256(path) in caught.value.message and "torch.nn.modules.linear.Linear" in caught.value.message
    said: list[str] = []
    loaded = load_model(path, trust=True, notice=said.append)
    assert loaded.kind == "pickle" and same(loaded.model, model)
    assert sha256(path) in "\n".join(said) and "torch.nn.modules.linear.Linear" in "\n".join(said)


def hostile_files(folder: Path, canary: Canary) -> list[Path]:
    """The canary in every kind of file that could run it."""
    weights = {"first.weight": torch.ones(4, 3)}
    files = [
        folder / name
        for name in ("zip.pt", "legacy.pth", "nested.bin", "plain.pt", "renamed.bin", "protocol4.pt")
    ]
    torch.save(canary, files[0])
    torch.save(canary, files[1], _use_new_zipfile_serialization=False)
    torch.save({"state_dict": weights, "config": canary}, files[2])
    files[3].write_bytes(pickle.dumps(canary))
    files[4].write_bytes(pickle.dumps([canary], protocol=0))
    torch.save({"weights": canary}, files[5], pickle_protocol=4)
    return files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_canary_is_never_run_without_trust(tmp_path):
    trace = tmp_path / "the-canary-ran"
    for path in hostile_files(tmp_path, Canary(trace)):
        facts = inspect(path)
        assert facts.readable and any("touch" in name or "getattr" in name for name in facts.globals), path
        for arch in (None, f"{ARCH}:Small"):
            assert code_of(path, arch=arch) == "untrusted"
        assert not trace.exists(), path
    said: list[str] = []
    with pytest.raises(ModelFileError):
        load_model(tmp_path / "zip.pt", trust=True, notice=said.append)
    assert trace.exists() and said, "the canary works, so the refusals above meant something"


def test_a_safetensors_name_does_not_make_a_pickle_safe(tmp_path):
    trace = tmp_path / "the-canary-ran"
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Canary(trace)))
    assert code_of(path, arch=f"{ARCH}:Small", trust=True) == "truncated"
    assert not trace.exists()


def test_globals_are_read_through_the_memo_and_past_decoys(tmp_path):
    def facts(content: bytes):
        path = tmp_path / "pickle.pt"
        path.write_bytes(content)
        return inspect(path)

    text = lambda value: b"\x8c" + bytes([len(value)]) + value  # noqa: E731
    memo = b"\x80\x04" + text(b"os") + b"\x94" + text(b"system") + b"\x94" + b"00" + b"h\x00h\x01\x93."
    assert facts(memo).globals == ("os.system",)
    decoy = b"\x80\x04" + text(b"os") + text(b"system") + text(b"math") + b"\x850\x93."
    assert facts(decoy).globals == ("os.system",)
    computed = b"\x80\x04" + text(b"os") + b"\x8c\x01a\x85\x93."
    assert facts(computed).globals == ("(a name that is computed while loading)",)
    assert not facts(b"\x80\x04\x93.").readable
    assert not facts(b"just some text").readable


@pytest.mark.parametrize("keep", [0, 1, 100, -200, -1])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
def test_truncated_files_are_named(tmp_path, model, keep, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=suffix == ".pt")
    path.write_bytes(path.read_bytes()[:keep])
    assert code_of(path, arch=f"{ARCH}:Small") == "truncated"


def test_what_is_no_model_is_named(tmp_path, model):
    assert code_of(tmp_path / "missing.pt") == "not-found"
    assert code_of(tmp_path) == "not-a-model"
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert code_of(tmp_path / "archive.pt") == "truncated"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert code_of(tmp_path / "script.pt", trust=True) == "torchscript"
    (tmp_path / "recipe.json").write_text("{}")
    assert code_of(tmp_path) == "artifact"


def test_an_exported_program_needs_trust(tmp_path):
    path = tmp_path / "program.pt2"
    x = torch.randn(2, 3)
    linear = nn.Linear(3, 2).eval()
    torch.export.save(torch.export.export(linear, (x,)), path)
    assert code_of(path) == "untrusted"
    loaded = load_model(path, trust=True, notice=lambda line: None)
    assert loaded.kind == "exported" and not any(part.training for part in loaded.model.modules())
    torch.testing.assert_close(loaded.model(x), linear(x))
    assert loaded.example is not None and torch.equal(loaded.example[0][0], x)
