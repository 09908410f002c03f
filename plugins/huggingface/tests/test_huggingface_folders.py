"""Model folders, from the adapter and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kpt
from kpt.cli.main import run
from kpt.modelfiles import ModelFileError, load_model
from kpt_plugin_huggingface.adapter import HuggingFace

transformers = pytest.importorskip("transformers")
ADAPTER = HuggingFace()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def code_of(path: Path, **options: bool) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, notice=lambda line: None, **options)
    assert caught.value.hint
    return caught.value.code


def edit(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_a_folder_becomes_the_model_with_its_head_and_weights(folder: Path) -> None:
    assert ADAPTER.executes(str(folder)) == ()
    loaded = load_model(folder)
    assert loaded.kind == "folder" and type(loaded.model).__name__ == "BertForSequenceClassification"
    assert not loaded.model.training and loaded.build == {"folder": str(folder)}
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(loaded.model.classifier.weight, weights["classifier.weight"])


def test_a_folder_of_another_library_is_left_to_others(tmp_path: Path) -> None:
    assert ADAPTER.load(str(tmp_path), trust=True) is None
    (tmp_path / "config.json").write_text('{"layers": 3}')
    assert ADAPTER.load(str(tmp_path), trust=True) is None and ADAPTER.executes(str(tmp_path)) == ()
    assert code_of(tmp_path) == "not-a-model"


def test_a_class_that_is_no_model_is_never_called(folder: Path) -> None:
    edit(folder, architectures=["pipeline"])
    assert type(load_model(folder).model).__name__ == "BertModel"


def test_weights_of_other_sizes_than_the_configurations_are_named(folder: Path) -> None:
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    edit(folder, hidden_size=2 * width)
    with pytest.raises(ModelFileError) as caught:
        load_model(folder)
    assert caught.value.code == "wrong-shapes"
    assert f"embeddings.LayerNorm.bias is ({width},), the model has ({2 * width},)" in caught.value.message


def test_missing_and_damaged_parts_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "query.weight" in name)
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest, folder / "model.safetensors", {"format": "pt"})
    assert code_of(folder) == "missing-keys"
    (folder / "model.safetensors").write_bytes(b"no")
    assert code_of(folder) == "truncated"
    (folder / "model.safetensors").unlink()
    assert code_of(folder) == "truncated"
    (folder / "config.json").write_text("{")
    assert code_of(folder) == "truncated"


def test_its_own_code_needs_trust(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    edit(folder, auto_map={"AutoModel": "mine.Mine"})
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')")
    with pytest.raises(ModelFileError, match="mine.py") as caught:
        load_model(folder)
    assert caught.value.code == "untrusted" and not trace.exists()
    with pytest.raises(ModelFileError):  # it runs, and then defines no model
        load_model(folder, trust=True, notice=lambda line: None)
    assert trace.exists(), "the code works, so the refusal above meant something"


def test_pickled_weights_need_trust_and_still_run_no_code(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    assert ADAPTER.executes(str(folder)) == (), "safetensors come first"
    (folder / "model.safetensors").unlink()
    assert code_of(folder) == "untrusted"
    said: list[str] = []
    model = load_model(folder, trust=True, notice=said.append).model
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])
    assert any("pytorch_model.bin" in line and "_rebuild_tensor" in line for line in said)


def test_a_kernel_from_the_hub_needs_trust(folder: Path) -> None:
    edit(folder, attn_implementation="someone/kernel")
    with pytest.raises(ModelFileError, match="someone/kernel") as caught:
        load_model(folder)
    assert caught.value.code == "untrusted"


def test_without_transformers_the_error_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpt_plugin_huggingface import library

    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match="pip install transformers") as caught:
        load_model(folder)
    assert caught.value.code == "missing-package"


def command(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def test_from_folder_to_artifact_and_back(folder: Path, tmp_path: Path, capsys) -> None:
    artifact = tmp_path / "artifact"
    options = ("--out", artifact, "--budget", 1, "--level", "exact", "--json")
    assert command("optimize", "--model", folder, *options) == 0
    printed = capsys.readouterr()
    assert "input_ids=int64[1,128]" in printed.err and json.loads(printed.out)["artifact"] == str(artifact)
    manifest = json.loads((artifact / "recipe.json").read_text())
    assert manifest["build"]["kind"] == "adapter" and not (artifact / "structure.pkl").exists()
    original, again = load_model(folder).model, kpt.load(artifact)
    assert type(again) is type(original)
    inputs = ADAPTER.example_inputs(original)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, original(**inputs).logits)


def test_without_the_plugin_both_ways_name_the_command_that_installs_it(
    folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpt import plugins
    from kpt.plugins import discovery

    artifact = tmp_path / "artifact"
    model = kpt.optimize(
        load_model(folder).model, {"input_ids": torch.ones(1, 4, dtype=torch.long)}, budget=1
    )
    kpt.save(model, artifact)
    found = discovery.candidates

    def without() -> tuple[list, list]:
        installed, statuses = found()
        return [entry for entry in installed if entry.name != "huggingface"], statuses

    monkeypatch.setattr(discovery, "candidates", without)
    plugins.clear_cache()
    try:
        assert command("optimize", "--model", folder, "--out", tmp_path / "other", "--json") == 1
        error = json.loads(capsys.readouterr().out)
        assert error["code"] == "missing-plugin" and "pip install kpt-plugin-huggingface" in error["hint"]
        with pytest.raises(kpt.artifact.ArtifactError, match="pip install kpt-plugin-huggingface"):
            kpt.load(artifact)
        assert type(kpt.load(artifact, model=load_with_library(folder))) is type(model)
    finally:
        monkeypatch.undo()
        plugins.clear_cache()


def load_with_library(folder: Path) -> torch.nn.Module:
    return transformers.BertForSequenceClassification.from_pretrained(folder)


def test_a_selection_that_leaves_the_plugin_out_is_told(folder: Path, tmp_path: Path, capsys) -> None:
    assert command("optimize", "--model", folder, "--no-plugins", "--out", tmp_path / "other", "--json") == 1
    error = json.loads(capsys.readouterr().out)
    assert error["code"] == "missing-plugin" and "was not selected" in error["message"]
