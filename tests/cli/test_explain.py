"""``kpt explain``: receipts, files that are none, and the ops of a model."""

from __future__ import annotations

import io
import json

import pytest

from kpt.cli.explain import _table
from kpt.cli.output import Output
from kpt.transaction.receipt import Entry, Receipt
from stand_ins import INPUTS, receipt


def test_explain_prints_a_receipt_from_an_artifact_or_a_file(kpt_cli, tmp_path):
    (tmp_path / "receipt.json").write_text(receipt().to_json())
    for path in (tmp_path, tmp_path / "receipt.json"):
        answer = kpt_cli("explain", path)
        assert answer.code == 0 and "freeze" in answer.out and "wrong by 1 %" in answer.out
        assert kpt_cli("explain", path, "--json").json["accepted"][0]["name"] == "freeze"
    wrapped = {"artifact": "x", "receipt": receipt().to_dict()}
    (tmp_path / "printed.json").write_text(json.dumps(wrapped))
    assert kpt_cli("explain", tmp_path / "printed.json").code == 0


def test_explain_prints_figures_sites_and_what_was_left_alone(kpt_cli, tmp_path):
    judged = Entry("bf16", "precision", "cpu", "kept", "right and faster", 1.4, {"error": 0.00123})
    norm = {
        "op": "rms_norm",
        "path": "layers.0.norm",
        "kind": "module",
        "binding": {"arguments": {"eps": "self.variance_epsilon"}},
    }
    full = Receipt("Net", "inference", "exact", "latency", accepted=[judged], rejected=receipt().rejected)
    full.sites, full.left_alone = [norm, {**norm, "path": "norm"}], [["head", "its output is random"]]
    (tmp_path / "receipt.json").write_text(full.to_json())
    shown = kpt_cli("explain", tmp_path).out
    assert "error 0.00123" in shown and "none: it was not judged" in shown
    assert "recognised: 2 × rms_norm" in shown
    assert "layers.0.norm" in shown and "eps=self.variance_epsilon" in shown
    assert "left alone: head: its output is random" in shown


def test_explain_says_that_a_recipe_is_no_receipt(kpt_cli, tmp_path):
    recipe = {"schema": 1, "key": "k", "steps": [], "figures": {}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    answer = kpt_cli("explain", tmp_path / "recipe.json", "--json")
    assert answer.code == 1 and answer.json["code"] == "bad-receipt"
    assert "it is a recipe, which holds a plan only" in answer.json["message"]
    assert "receipt.json" in answer.json["hint"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 999}', '{"schema": 1, "model": "Net"}'])
def test_explain_names_what_is_no_receipt(kpt_cli, tmp_path, content):
    (tmp_path / "receipt.json").write_text(content)
    answer = kpt_cli("explain", tmp_path / "receipt.json", "--json")
    assert answer.code == 1 and answer.json["code"] == "bad-receipt"
    assert kpt_cli("explain", tmp_path / "missing").code == 2
    assert kpt_cli("explain").code == 2


def test_explain_takes_the_folder_that_it_runs_in(kpt_cli, tmp_path, monkeypatch):
    (tmp_path / "receipt.json").write_text(receipt().to_json())
    monkeypatch.chdir(tmp_path)
    assert "1.40x in company" in kpt_cli("explain", ".").out
    assert kpt_cli("explain", ".", "--model", ".").code == 2


def test_explain_lists_the_ops_of_a_model(kpt_cli, model_file):
    path, arch = model_file
    options = ("explain", "--model", path, "--arch", arch, "--inputs", INPUTS, "--no-plugins")
    sites = kpt_cli(*options, "--json").json["sites"]
    assert {site["op"]: site["path"] for site in sites} == {"layer_norm": "norm", "linear": "out"}
    assert "1 × layer_norm, 1 × linear" in kpt_cli(*options).out


def test_brackets_in_a_result_are_no_markup():
    site = {"op": "linear", "path": "out", "kind": "module", "arguments": {"weight": "self.packed[bits]"}}
    alone = [["norm", "ValueError: no [eps] in [/model]"]]
    data = {"model": "Net", "parameters": 1, "sites": [site], "left_alone": alone}
    shown = io.StringIO()
    Output(stdout=shown).result({}, _table(data))
    assert "self.packed[bits]" in shown.getvalue() and "no [eps] in [/model]" in shown.getvalue()
