"""What the adapter knows about models: what they are called with, how they are built again, their blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kpt.specs import AdapterError
from kpt_plugin_huggingface.adapter import HuggingFace
from model_families import FAMILIES

transformers = pytest.importorskip("transformers")
ADAPTER = HuggingFace()


def tensors(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def bert(**settings: Any) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertModel(transformers.BertConfig(**small, vocab_size=50, **settings)).eval()


def test_only_models_of_the_library_match() -> None:
    assert ADAPTER.matches(bert())
    assert not ADAPTER.matches(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_is_called_and_built_again(family, tmp_path: Path) -> None:
    model = family.build()
    inputs = ADAPTER.example_inputs(model)
    assert inputs is not None and model.main_input_name in inputs
    assert set(family.example_inputs()) <= {*inputs, "attention_mask"}, "as a person would call it"
    assert tensors(model(**inputs))
    description = ADAPTER.describe(model, str(tmp_path))
    again = ADAPTER.build(json.loads(json.dumps(description)), str(tmp_path))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        mine, theirs = (tensors(m.eval()(**family.example_inputs())) for m in (model, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_inputs_are_typical_and_the_same_each_time() -> None:
    model = bert(max_position_embeddings=512)
    inputs = ADAPTER.example_inputs(model)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (1, 128),
        "attention_mask": (1, 128),
        "token_type_ids": (1, 128),
    }
    ids = inputs["input_ids"]
    assert int(ids.max()) < 50 and int(ids.min()) > 0 and len(ids.unique()) > 20, "no padding among them"
    again = ADAPTER.example_inputs(model)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)


def test_a_batch_of_pixels_has_the_dtype_of_the_model() -> None:
    model = FAMILIES["vit"].build().bfloat16()
    assert ADAPTER.example_inputs(model)["pixel_values"].dtype == torch.bfloat16


def test_asking_for_inputs_changes_nothing() -> None:
    model = FAMILIES["resnet"].build().train()
    model.resnet.encoder.eval()
    modes = [module.training for module in model.modules()]
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
    ADAPTER.example_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert [module.training for module in model.modules()] == modes


def test_a_model_that_no_guess_runs_has_no_inputs() -> None:
    class Picky(transformers.BertModel):
        def forward(self, secret):
            raise ValueError("no")

    assert ADAPTER.example_inputs(Picky(bert().config)) is None


def test_blocks_are_the_layers_that_repeat() -> None:
    assert ADAPTER.blocks(bert()) == ("encoder.layer.0", "encoder.layer.1")
    swin = FAMILIES["swin"].build()
    paths = ADAPTER.blocks(swin)
    depths = [path.count(".") for path in paths]
    assert depths == sorted(depths) and len(set(depths)) > 1, "stages before the layers in them"
    assert all(isinstance(swin.get_submodule(path), torch.nn.Module) for path in paths)


def test_what_the_owner_chose_survives_building(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 7
    again = ADAPTER.build(ADAPTER.describe(model, str(tmp_path)), str(tmp_path))
    assert again.config._attn_implementation == "eager" and again.generation_config.max_new_tokens == 7


def test_a_model_that_would_come_back_different_is_not_described(tmp_path: Path) -> None:
    class Own(transformers.BertModel):
        pass

    changed, shorter = bert(), bert()
    changed.encoder.layer[0].output.dense = torch.nn.Linear(16, 8, bias=False)
    del shorter.encoder.layer[1]
    quantised = bert()
    quantised.config.quantization_config = {"quant_method": "mine"}
    state = torch.get_rng_state()
    for model in (Own(bert().config), changed, shorter, quantised):
        assert ADAPTER.describe(model, str(tmp_path)) is None
        assert list(tmp_path.iterdir()) == []
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"class": "pipeline", "config": "BertConfig"},
        {"class": "BertModel", "config": "AutoConfig"},
        {"class": "utils.import_utils", "config": "BertConfig"},
        {"class": "BertModel", "config": 7},
        {"class": "NoSuchModel", "config": "BertConfig"},
    ],
)
def test_nothing_but_models_of_the_library_is_built(tmp_path: Path, description: dict[str, Any]) -> None:
    bert().config.to_json_file(tmp_path / "config.json")
    with pytest.raises(AdapterError) as caught:
        ADAPTER.build(description, str(tmp_path))
    assert caught.value.code == "not-buildable" and caught.value.hint


def test_an_artifact_cannot_ask_for_a_kernel_from_the_hub(tmp_path: Path) -> None:
    config = bert().config
    config.to_json_file(tmp_path / "config.json")
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**facts, "attn_implementation": "someone/kernel"}))
    description = {"class": "BertModel", "config": "BertConfig", "attention": {"": "someone/kernel"}}
    assert ADAPTER.build(description, str(tmp_path)).config._attn_implementation in ("sdpa", "eager")
