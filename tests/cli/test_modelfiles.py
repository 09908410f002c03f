"""Model files: what is safe is loaded, what is executable is refused, what is damaged is named."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kpt.modelfiles import ModelFileError, load_model
from kpt.modelfiles.pickles import inspect, sha256


class Small(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def broken() -> nn.Module:
    raise SystemExit("needs arguments")


ARCH = "kpt_test_architectures"


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    module = types.ModuleType(ARCH)
    vars(module).update(Small=Small, Tied=Tied, Other=Other, broken=broken, number=7, text=lambda: "model")
    module.Wide = lambda: Small(5)  # type: ignore[attr-defined]
    module.half = lambda: Small().bfloat16()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, ARCH, module)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def code_of(path, **options) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, **options)
    assert caught.value.hint
    return caught.value.code


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_fills_its_architecture(tmp_path, model, legacy):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(path, arch=f"{ARCH}:Small")
    assert same(loaded.model, model) and not loaded.model.training
    assert (loaded.kind, loaded.sha256, loaded.build) == (
        "state-dict",
        sha256(path),
        {"arch": f"{ARCH}:Small"},
    )


def test_safetensors_fills_its_architecture(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors", arch=f"{ARCH}:Small")
    assert loaded.kind == "safetensors" and same(loaded.model, model)


def test_weights_of_a_checkpoint_and_wrapper_prefixes_are_found(tmp_path, model):
    path = tmp_path / "checkpoint.pth"
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    said: list[str] = []
    loaded = load_model(path, arch=f"{ARCH}:Small", notice=said.append)
    assert same(loaded.model, model)
    assert any("'state_dict'" in line for line in said) and any("'_orig_mod.'" in line for line in said)


def test_a_tensor_that_is_tied_may_be_stored_once(tmp_path):
    source = Tied()
    save_file({"embed.weight": source.embed.weight.detach()}, tmp_path / "tied.safetensors")
    loaded = load_model(tmp_path / "tied.safetensors", arch=f"{ARCH}:Tied").model
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, source.embed.weight)


@pytest.mark.parametrize(
    ("stored", "arch"), [("bfloat16", "Small"), ("float32", "half"), ("float64", "Small")]
)
def test_the_model_takes_the_dtype_of_the_weights_so_that_nothing_is_rounded(tmp_path, model, stored, arch):
    model = model.to(getattr(torch, stored))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert same(load_model(tmp_path / "model.pt", arch=f"{ARCH}:{arch}").model, model)


def test_weights_that_do_not_fit_are_named(tmp_path, model):
    weights = model.state_dict()
    path = tmp_path / "model.pt"

    def message(content, arch="Small"):
        torch.save(content, path)
        with pytest.raises(ModelFileError) as caught:
            load_model(path, arch=f"{ARCH}:{arch}")
        return caught.value

    less = {name: value for name, value in weights.items() if name != "last.bias"}
    assert message(less).code == "missing-keys" and "last.bias" in str(message(less))
    more = {**weights, "extra.weight": torch.ones(2)}
    assert message(more).code == "unexpected-keys" and "extra.weight" in str(message(more))
    assert message(weights, "Wide").code == "wrong-shapes"
    assert "first.weight is (4, 3), the model has (5, 3)" in str(message(weights, "Wide"))
    integers = {**weights, "last.bias": torch.ones(2, dtype=torch.int8)}
    assert message(integers).code == "wrong-dtypes"
    assert message(weights, "Other").code == "wrong-architecture"
    assert message({"epoch": 3}).code == "no-weights" and "epoch" in str(message({"epoch": 3}))
    assert message([1, 2]).code == "no-weights"


def test_weights_alone_need_an_architecture(tmp_path, model):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    assert code_of(path) == "needs-arch"
    for arch in (
        "Small",
        "not_there_42:Small",
        f"{ARCH}:Missing",
        f"{ARCH}:broken",
        f"{ARCH}:number",
        f"{ARCH}:text",
    ):
        assert code_of(path, arch=arch) == "bad-arch"


def test_a_pickled_model_needs_trust_and_is_announced(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.ModuleType(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "Small", Small, raising=False)
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
    assert loaded.kind == "exported"
    torch.testing.assert_close(loaded.model(x), linear(x))


@pytest.fixture
def folder(tmp_path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_hugging_face_folder_is_loaded(folder):
    loaded = load_model(folder)
    assert loaded.kind == "huggingface" and type(loaded.model).__name__ == "BertModel"
    assert not loaded.model.training and loaded.build == {"folder": str(folder)}


def test_a_folder_with_missing_or_damaged_parts_is_named(folder):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    assert code_of(folder) == "missing-keys"
    (folder / "model.safetensors").write_bytes(b"no")
    assert code_of(folder) == "truncated"
    (folder / "config.json").write_text("{")
    assert code_of(folder) == "truncated"


def test_a_folder_with_its_own_code_needs_trust(folder, tmp_path):
    trace = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')")
    with pytest.raises(ModelFileError, match="mine.py") as caught:
        load_model(folder)
    assert caught.value.code == "untrusted" and not trace.exists()


def test_a_plugins_adapter_comes_first_and_its_failure_is_told(folder, monkeypatch):
    import kpt
    from kpt.plugins import registry
    from kpt.specs import AdapterSpec

    module = sys.modules[ARCH]

    class Adapter:
        def load(self, path):
            return Small()

    class Failing:
        def load(self, path):
            raise SystemExit("no")

    module.Adapter, module.Failing = Adapter, Failing  # type: ignore[attr-defined]

    class Plugin:
        @kpt.hookimpl
        def kpt_model_adapters(self):
            yield AdapterSpec("failing", f"{ARCH}:Failing", "none")
            yield AdapterSpec("mine", f"{ARCH}:Adapter", "none")

    said: list[str] = []
    loaded = load_model(folder, registry=registry([Plugin()]), notice=said.append)
    assert type(loaded.model) is Small and "SystemExit: no" in said[0]
