"""Model files: what is safe is loaded, what is executable is refused, what is damaged is named."""

from __future__ import annotations

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
    module.Holder = Holder  # type: ignore[attr-defined]
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
    torch.save({"epoch": 3, "rng_state": torch.get_rng_state(), "state_dict": wrapped}, path)
    said: list[str] = []
    loaded = load_model(path, arch=f"{ARCH}:Small", notice=said.append)
    assert same(loaded.model, model)
    assert any("'state_dict'" in line for line in said) and any("'_orig_mod.'" in line for line in said)


class Holder(nn.Module):
    """A model whose one child is called as DataParallel calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Small()


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "model.", "network.inner."]
)
def test_a_prefix_of_every_name_is_left_out_and_told(tmp_path, model, prefix):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        said: list[str] = []
        loaded = load_model(tmp_path / name, arch=f"{ARCH}:Small", notice=said.append)
        assert same(loaded.model, model) and all("left out" in line for line in said) and said


def test_wrappers_inside_of_names_are_left_out(tmp_path, model):
    names = {name: name.replace("first.", "first._orig_mod.") for name in model.state_dict()}
    torch.save({names[name]: value for name, value in model.state_dict().items()}, tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Small", notice=lambda line: None)
    assert same(loaded.model, model)


def test_names_that_the_model_knows_are_kept(tmp_path):
    source, said = Holder(), []
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Holder", notice=said.append)
    assert same(loaded.model, source) and not said
    doubled = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save(doubled, tmp_path / "weights.pt")
    assert same(load_model(tmp_path / "weights.pt", arch=f"{ARCH}:Holder").model, source)


def test_a_model_beside_other_things_of_a_checkpoint_is_found(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[type(model).__module__])
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 3, "model": model}, path)
    assert code_of(path) == "untrusted"
    said: list[str] = []
    loaded = load_model(path, trust=True, notice=said.append)
    assert loaded.kind == "pickle" and same(loaded.model, model)
    assert any("'model'" in line for line in said)


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
    assert loaded.kind == "exported" and not any(part.training for part in loaded.model.modules())
    torch.testing.assert_close(loaded.model(x), linear(x))
    assert loaded.example is not None and torch.equal(loaded.example[0][0], x)


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A model folder of an imaginary library, which has files that run code when they are loaded."""
    path = tmp_path / "library-model"
    path.mkdir()
    (path / "config.json").write_text('{"library": "imaginary"}')
    (path / "code.py").write_text("raise SystemExit('it ran')")
    torch.save(model, path / "whole.bin")
    return path


class Adapter:
    """Loads what ``model`` is set to; a test sets what is executed and what is raised."""

    model: nn.Module | None = None
    executed: tuple[str, ...] = ()
    error: BaseException | None = None
    trusted: list[bool] = []

    def executes(self, folder):
        return type(self).executed

    def load(self, folder, *, trust):
        type(self).trusted.append(trust)
        if type(self).error is not None:
            raise type(self).error
        return type(self).model


def plugins(*adapters: type):
    """A registry with these adapters, in this order."""
    import kpt
    from kpt.plugins import registry
    from kpt.specs import AdapterSpec

    for number, adapter in enumerate(adapters):
        setattr(sys.modules[ARCH], f"Adapter{number}", adapter)

    class Plugin:
        @kpt.hookimpl
        def kpt_model_adapters(self):
            for number, _ in enumerate(adapters):
                yield AdapterSpec(f"adapter-{number}", f"{ARCH}:Adapter{number}", "imaginary")

    return registry([Plugin()])


def adapter(**facts) -> type:
    return type("Made", (Adapter,), {"trusted": [], **facts})


def test_the_first_adapter_that_knows_a_folder_loads_it(folder, model):
    model.train()
    unknowing, knowing, later = adapter(), adapter(model=model), adapter(model=Other())
    loaded = load_model(folder, registry=plugins(unknowing, knowing, later))
    assert loaded.model is model and not model.training
    assert (loaded.kind, loaded.build) == ("folder", {"folder": str(folder)})
    assert (unknowing.trusted, knowing.trusted, later.trusted) == ([False], [False], [])


def test_an_adapter_that_breaks_is_told_of_and_the_next_one_is_asked(folder, model):
    said: list[str] = []
    broken_ones = (
        adapter(error=SystemExit("no")),
        adapter(model="a string"),
        type("Bad", (), {"__init__": lambda self: 1 / 0}),
    )
    loaded = load_model(folder, registry=plugins(*broken_ones, adapter(model=model)), notice=said.append)
    assert loaded.model is model
    text = "\n".join(said)
    assert "SystemExit: no" in text and "returned a str" in text and "ZeroDivisionError" in text
    with pytest.raises(ModelFileError, match="SystemExit: no") as caught:
        load_model(folder, registry=plugins(broken_ones[0]), notice=said.append)
    assert caught.value.code == "adapter-failed"


def test_what_an_adapter_says_of_its_own_folder_reaches_the_user(folder):
    from kpt.specs import AdapterError

    failing = adapter(error=AdapterError("missing-keys", "It lacks a.weight.", "Download it again."))
    never = adapter(model=Small())
    with pytest.raises(ModelFileError) as caught:
        load_model(folder, registry=plugins(failing, never))
    error = caught.value
    assert (error.code, error.message, error.hint) == (
        "missing-keys",
        "It lacks a.weight.",
        "Download it again.",
    )
    assert never.trusted == []


def test_what_a_folder_executes_needs_trust_and_is_announced(folder, model):
    executing = adapter(model=model, executed=("code.py", "whole.bin", "a kernel from elsewhere"))
    with pytest.raises(ModelFileError, match="code.py, whole.bin, a kernel") as caught:
        load_model(folder, registry=plugins(executing))
    assert caught.value.code == "untrusted" and "--trust-model" in caught.value.hint
    assert executing.trusted == [], "nothing was loaded"
    said: list[str] = []
    load_model(folder, registry=plugins(executing), trust=True, notice=said.append)
    assert executing.trusted == [True]
    text = "\n".join(said)
    assert sha256(folder / "code.py") in text and "a kernel from elsewhere" in text
    assert sha256(folder / "whole.bin") in text and "torch.nn.modules.linear.Linear" in text


def test_a_folder_without_its_plugin_names_the_command_that_installs_it(folder, monkeypatch):
    from kpt.plugins import Registry
    from kpt.plugins.status import PluginStatus

    def error(*statuses):
        with pytest.raises(ModelFileError) as caught:
            load_model(folder, registry=Registry(statuses, {}))
        assert caught.value.code == "missing-plugin" and str(folder) in caught.value.message
        return caught.value

    assert "pip install kpt-plugin-huggingface" in error().hint
    disabled = PluginStatus("huggingface", "kpt-plugin-huggingface", "1", "disabled", "not named", "name it")
    found = error(disabled)
    assert "disabled: not named" in found.message and "name it" in found.hint
    with pytest.raises(ModelFileError, match="no plugin knows"):
        load_model(folder.parent, registry=Registry([], {}))
