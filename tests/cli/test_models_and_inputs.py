"""Models and inputs that commands have in common: what does not fit is named alike."""

from __future__ import annotations

import pytest

from stand_ins import INPUTS


@pytest.mark.parametrize("command", ["optimize", "explain", "bench"])
@pytest.mark.parametrize(
    ("inputs", "found", "said"),
    [
        ("x=float32[4,9]", (1, "model-fails"), "does not run on these inputs: RuntimeError"),
        ("y=float32[4,8]", (2, "usage"), "do not fit Net.forward(x: "),
        ("float32[4,8] float32[4]", (2, "usage"), "too many positional arguments"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(
    command, inputs, found, said, kpt_cli, model_file, tmp_path
):
    path, arch = model_file
    out = ("--out", tmp_path / "out") if command == "optimize" else ()
    answer = kpt_cli(command, "--model", path, "--arch", arch, "--inputs", inputs, *out, "--json")
    assert (answer.code, answer.json["code"]) == found
    assert said in answer.json["message"] and "--inputs" in answer.json["hint"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["optimize", "bench"])
def test_dynamic_dimensions_that_no_input_has_are_a_usage_error(command, kpt_cli, model_file):
    path, arch = model_file
    options = ("--model", path, "--arch", arch, "--inputs", INPUTS, "--json")
    for dynamic in ("z:0=batch", "x:7=batch"):
        answer = kpt_cli(command, *options, "--dynamic", dynamic)
        assert (answer.code, answer.json["code"]) == (2, "usage"), answer.json
        assert answer.json["message"].startswith("--dynamic: ")
