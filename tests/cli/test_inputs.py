"""``--inputs`` and ``--dynamic``."""

from __future__ import annotations

import pickle
import sys
import types

import numpy
import pytest
import torch
from safetensors.torch import save_file

import kpt
from kpt.cli.guesses import guessed_inputs
from kpt.cli.inputs import default_inputs, dynamic_shapes, example_inputs
from kpt.cli.output import CommandError
from kpt.plugins import registry
from kpt.specs import AdapterSpec


def test_named_specs_become_keyword_arguments():
    made = example_inputs(["input_ids=int64[2,7]:5..9 attention_mask=int64[2,7]:ones", "flag=bool[3]"])
    assert list(made) == ["input_ids", "attention_mask", "flag"]
    ids = made["input_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (2, 7) and 5 <= int(ids.min()) <= int(ids.max()) < 9
    assert len(ids.unique()) > 1
    assert bool((made["attention_mask"] == 1).all()) and made["flag"].dtype == torch.bool


def test_unnamed_specs_become_positional_arguments():
    x, scale = example_inputs(["float32[1, 3, 4];bfloat16[]:-2..-1"])
    assert x.shape == (1, 3, 4) and float(x.std()) > 0.1
    assert scale.dtype == torch.bfloat16 and scale.shape == () and -2 <= float(scale) <= -1


def test_complex_numbers_need_no_range():
    z = example_inputs(["z=complex64[3,4]"])["z"]
    assert z.dtype == torch.complex64 and z.shape == (3, 4) and float(z.imag.std()) > 0.1


def test_the_same_spec_gives_the_same_values():
    assert torch.equal(example_inputs(["x=float32[5]"])["x"], example_inputs(["x=float32[5]"])["x"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x", "cannot be read"),
        ("x=float33[3]", "not a dtype"),
        ("x=Tensor[3]", "cannot be read"),
        ("x=int64[3]", "need their range"),
        ("x=int64[3]:5..5", "is empty"),
        ("x=int64[3]:all", "neither LOW..HIGH"),
        ("x=float32[99999999,99999]", "elements"),
        ("x=float32[2] x=float32[2]", "twice"),
        ("x=float32[2] float32[2]", "mixes"),
        ("missing.json", "no such file"),
        ("missing.npz", "no such file"),
        ("x=bool[3]:0..2", "have no range"),
        ("x=float32[3]:5..1", "is empty"),
        ("x=int64[3]:0.5..3", "whole numbers"),
        ("x=uint8[3]:0..257", "beyond what torch.uint8 holds"),
        ("x=float16[3]:0..70000", "beyond what torch.float16 holds"),
        ("x=qint8[3]:0..3", "quantised"),
    ],
)
def test_what_cannot_be_read_is_quoted(text, reason):
    with pytest.raises(CommandError, match=reason) as caught:
        example_inputs([text])
    assert caught.value.exit_code == 2


def test_files_hold_one_example_or_several(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    torch.save([{"x": x}, {"x": x + 1}], tmp_path / "inputs.pt")
    first, second = example_inputs([str(tmp_path / "inputs.pt")])
    assert torch.equal(second["x"] - first["x"], torch.ones(2, 3))
    save_file({"x": x}, tmp_path / "inputs.safetensors")
    assert torch.equal(example_inputs([str(tmp_path / "inputs.safetensors")])["x"], x)
    (tmp_path / "inputs.json").write_text('{"x": [[1, 2]], "y": {"dtype": "float16", "data": [1.5]}}')
    made = example_inputs([str(tmp_path / "inputs.json")])
    assert made["x"].dtype == torch.int64 and made["y"].dtype == torch.float16
    (tmp_path / "inputs.json").write_text('[{"x": [1]}, {"x": [2]}]')
    assert [int(entry["x"]) for entry in example_inputs([str(tmp_path / "inputs.json")])] == [1, 2]


def test_arrays_of_numpy_are_read_and_pickles_in_them_are_not(tmp_path):
    x = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    numpy.savez(tmp_path / "inputs.npz", x=x, flag=numpy.array([True]))
    made = example_inputs([str(tmp_path / "inputs.npz")])
    assert torch.equal(made["x"], torch.from_numpy(x)) and made["flag"].dtype == torch.bool
    numpy.save(tmp_path / "inputs.npy", x)
    assert torch.equal(example_inputs([str(tmp_path / "inputs.npy")]), torch.from_numpy(x))
    trace = tmp_path / "ran"
    numpy.savez(tmp_path / "inputs.npz", x=numpy.array([Canary(trace)], dtype=object))
    with pytest.raises(CommandError, match="allow_pickle") as caught:
        example_inputs([str(tmp_path / "inputs.npz")])
    assert caught.value.code == "bad-inputs" and "numpy.savez" in caught.value.hint and not trace.exists()


def test_every_value_of_a_type_may_be_the_bound_of_a_range():
    assert int(example_inputs(["x=uint8[4]:255..256"])["x"].min()) == 255
    assert int(example_inputs(["x=int8[4]:-128..-127"])["x"].max()) == -128


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".npy", ".json"])
def test_a_file_that_is_empty_is_said_to_be(tmp_path, suffix):
    path = tmp_path / f"inputs{suffix}"
    path.touch()
    with pytest.raises(CommandError, match="cannot be read: it is empty") as caught:
        example_inputs([str(path)])
    assert caught.value.code == "bad-inputs" and caught.value.hint


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_inputs_never_runs_code(tmp_path):
    trace = tmp_path / "ran"
    torch.save(Canary(trace), tmp_path / "inputs.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Canary(trace)))
    for name in ("inputs.pt", "plain.pt"):
        with pytest.raises(CommandError) as caught:
            example_inputs([str(tmp_path / name)])
        assert caught.value.code == "bad-inputs" and not trace.exists()
        assert "more than tensors; globals: " in caught.value.message
        assert "weights_only" not in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "3", '{"x": {"data": [1]}}', '{"x": "text"}', '{"x": [[1], [1, 2]]}'),
        '{"x": {"data": [1], "dtype": "float99"}}',
    ],
)
def test_a_json_file_that_is_no_example_is_named(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(CommandError) as caught:
        example_inputs([str(tmp_path / "inputs.json")])
    assert caught.value.code == "bad-inputs" and caught.value.hint.startswith("Write {")


def test_dynamic_dimensions_are_read():
    assert dynamic_shapes([]) is None
    assert dynamic_shapes(["input_ids:0=batch,1=sequence mask:1=sequence", "x:-1=width"]) == {
        "input_ids": {0: "batch", 1: "sequence"},
        "mask": {1: "sequence"},
        "x": {-1: "width"},
    }
    for text in ("input_ids", "input_ids:batch=0", ":0=batch", "x:0=", "x:"):
        with pytest.raises(CommandError, match="cannot be read"):
            dynamic_shapes([text])


def test_without_inputs_the_model_may_know_its_own():
    class Knows(torch.nn.Linear):
        dummy_inputs = {"input": torch.ones(1, 2)}

    found = default_inputs(Knows(2, 2), registry([]))
    assert list(found) == ["input"]
    with pytest.raises(CommandError, match="its forward takes first, second") as caught:
        default_inputs(Pair(), registry([]))
    assert "--inputs" in caught.value.hint


class Library:
    """An adapter whose example a test sets."""

    example: object = None

    def matches(self, model):
        return True

    def example_inputs(self, model):
        model.train()
        return Library.example


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ([torch.ones(1, 2)], "returned list; expected a mapping or None"),
        ({"nope": torch.ones(1, 2)}, "missing a required argument: 'input'"),
        ({"input": "text"}, "holds no tensor"),
        ({1: torch.ones(1, 2)}, "whose key 1 is no string"),
    ],
)
def test_an_example_that_is_no_call_is_the_adapters_fault(example, says, monkeypatch, capsys):
    module = types.ModuleType("kpt_test_examples")
    module.Library = Library
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Library, "example", example)

    class Plugin:
        @kpt.hookimpl
        def kpt_model_adapters(self):
            yield AdapterSpec("odd", "kpt_test_examples:Library", "torch")

    model = torch.nn.Linear(2, 2).eval()
    made = default_inputs(model, registry([Plugin()]))
    assert list(made) == ["input"] and made["input"].shape == (1, 2) and not model.training
    assert says in capsys.readouterr().err


class Pair(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, first, second):
        return super().forward(first + second)


class Images(torch.nn.Sequential):
    """Runs on images of 28 by 28 only."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2 * 26 * 26, 3))


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)

    def forward(self, ids, scale=1.0):
        return self.embedding(ids) * scale


@pytest.mark.parametrize(
    ("model", "name", "shape", "dtype"),
    [
        (torch.nn.Linear(6, 2).to(torch.bfloat16), "input", (1, 6), torch.bfloat16),
        (Images(), "input", (1, 1, 28, 28), torch.float32),
        (torch.nn.Conv1d(3, 2, 3), "input", (1, 3, 16000), torch.float32),
        (Tokens(), "ids", (1, 128), torch.int64),
        (torch.nn.RNN(6, 4), "input", None, None),
        (torch.nn.ReLU(), "input", None, None),
        (Pair(), "first", None, None),
    ],
)
def test_inputs_are_guessed_from_the_first_layer_and_tried(model, name, shape, dtype, capsys):
    random = torch.get_rng_state()
    found = guessed_inputs(model)
    assert torch.equal(torch.get_rng_state(), random)
    if shape is None:
        assert found is None
        return
    assert {key: (tuple(v.shape), v.dtype) for key, v in found.items()} == {name: (shape, dtype)}
    model(**default_inputs(model, registry([])))
    assert "guessed from the first layer" in capsys.readouterr().err
