"""``kpt bench``: contenders see the same inputs, and wrong, failing or absent ones are told apart."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import kpt
from kpt.cli.bench import _kinds, _kinds_table
from kpt.cli.contest import Entrant, by_name, contest, eager
from kpt.cli.output import CommandError
from kpt.judge.calls import Call
from kpt.judge.kinds import Kind
from kpt.plugins import registry
from stand_ins import INPUTS, receipt


def entrants(*functions):
    def prepared(function):
        return lambda model, example: lambda inputs: function(model, inputs)

    return [eager(), *(Entrant(f.__name__, prepared(f)) for f in functions)]


def test_contenders_see_the_same_fresh_inputs_and_wrong_or_failing_ones_are_told_apart():
    seen: dict[str, list[float]] = {"right": [], "wrong": []}

    def right(model, inputs):
        seen["right"].append(float(inputs["input"].sum()))
        return model(**inputs)

    def wrong(model, inputs):
        seen["wrong"].append(float(inputs["input"].sum()))
        inputs["input"].zero_()
        return {"out": model(**inputs) * 1.01}

    def failing(model, inputs):
        raise SystemExit("no licence")

    def late(model, inputs):
        if calls["late"]:
            raise OSError("only the first shape")
        calls["late"] += 1
        return model(**inputs)

    calls = {"late": 0}
    model = torch.nn.Linear(4, 4)
    weights = model.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    found = entrants(right, wrong, failing, late)
    contest(
        model,
        found,
        lambda: Call((torch.randn(2, 4, generator=generator),)),
        seconds=0.0,
        rounds=6,
        tell=lambda t: None,
    )
    by = {entrant.name: entrant for entrant in found}
    assert by["right"].error == 0.0 and by["wrong"].error > 1e-3
    assert "SystemExit: no licence" in by["failing"].failed and "OSError" in by["late"].failed
    assert len(by["right"].spans[0]) == len(by["eager"].spans[0]) == len(by["wrong"].spans[0]) >= 5
    assert by["right"].low <= by["right"].ratio <= by["right"].high
    assert seen["right"][1:] == seen["wrong"][1:] and len(set(seen["right"][1:])) > 5
    assert torch.equal(model.weight, weights)


def test_a_contender_that_fails_while_it_is_timed_leaves_the_others_in():
    left = 4

    def tires(model, inputs):
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit("out of credits")
        return model(**inputs)

    def steady(model, inputs):
        return model(**inputs)

    model = torch.nn.Linear(4, 4)
    found = entrants(tires, steady)
    contest(model, found, lambda: Call((torch.ones(2, 4),)), seconds=0.0, rounds=6, tell=lambda text: None)
    reference, tired, other = found
    assert "while it was timed: SystemExit: out of credits" in tired.to_dict()["reason"]
    assert tired.to_dict()["state"] == "failed" and other.to_dict()["state"] == "ran"
    assert len(other.spans[0]) == len(reference.spans[0]) >= 5


def test_kinds_of_calls_take_turns_and_all_of_them_count(monkeypatch):
    """The median of all calls would be that of the small ones, which are the most."""
    now = [0.0]
    monkeypatch.setattr("kpt.cli.contest.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Rows(torch.nn.Module):
        def forward(self, input):
            now[0] += 2.0 if len(input) == 1 else 8.0
            return input

    def helps_batches(model, inputs):
        now[0] += 2.0

    def helps_nobody(model, inputs):
        model(**inputs)

    kinds = [
        Kind("single", 0.75, lambda: Call((torch.ones(1, 4),))),
        Kind("batch", 0.25, lambda: Call((torch.ones(8, 4),))),
    ]
    found = entrants(helps_batches, helps_nobody)
    contest(Rows(), found, kinds, seconds=0.0, rounds=10, tell=lambda text: None)
    _, helps, same = found
    assert [len(spans) for spans in helps.spans] == [3, 3] and helps.to_dict()["spans"] == 6
    assert helps.ratio == pytest.approx(4**0.25) and helps.low == helps.high == helps.ratio
    assert same.ratio == 1.0 and same.seconds == pytest.approx(2.0 * 0.75 + 8.0 * 0.25)
    told = helps.to_dict()["kinds"]
    assert [(kind["label"], kind["share"]) for kind in told] == [("single", 0.75), ("batch", 0.25)]
    assert [kind["seconds"] for kind in told] == [2.0, 2.0]
    shown = io.StringIO()
    Console(file=shown, width=100).print(_kinds_table([entrant.to_dict() for entrant in found]))
    single, batch = (line for line in shown.getvalue().splitlines() if "% of the calls" in line)
    assert "single, 75%" in single and single.count("2.00 s") == 3
    assert "batch, 25%" in batch and batch.count("8.00 s") == 2 and batch.count("2.00 s") == 1


def test_a_contender_is_compared_on_every_kind_of_call():
    def wrong_on_singles(model, inputs):
        return model(**inputs) * (1.1 if len(inputs["input"]) == 1 else 1.0)

    def silent_on_singles(model, inputs):
        return model(**inputs) if len(inputs["input"]) > 1 else None

    kinds = [
        Kind("single", 0.5, lambda: Call((torch.ones(1, 4),))),
        Kind("batch", 0.5, lambda: Call((torch.ones(8, 4),))),
    ]
    found = entrants(wrong_on_singles, silent_on_singles)
    contest(torch.nn.Linear(4, 4), found, kinds, seconds=0.0, rounds=6, tell=lambda text: None)
    reference, wrong, silent = found
    assert reference.error == 0.0 and wrong.error == pytest.approx(0.1) and silent.error is None


def test_a_contender_that_fails_after_one_kind_costs_no_table():
    timed = 0

    def fails_on_batches(model, inputs):
        nonlocal timed
        timed += 1
        if len(inputs["input"]) > 1 and timed > 6:
            raise MemoryError("too large")
        return model(**inputs)

    kinds = [
        Kind("single", 0.5, lambda: Call((torch.ones(1, 4),))),
        Kind("batch", 0.5, lambda: Call((torch.ones(8, 4),))),
    ]
    found = entrants(fails_on_batches)
    contest(torch.nn.Linear(4, 4), found, kinds, seconds=0.0, rounds=6, tell=lambda text: None)
    assert found[1].to_dict()["state"] == "failed" and any(found[1].spans)
    shown = io.StringIO()
    Console(file=shown, width=100).print(_kinds_table([entrant.to_dict() for entrant in found]))
    assert "eager" in shown.getvalue() and "fails_on_batches" not in shown.getvalue()


def test_kinds_are_drawn_as_the_clock_draws_them():
    """Examples without padding have no padding here either, although the mask of others has."""

    class Masked(torch.nn.Module):
        def forward(self, x, attention_mask):
            return x * attention_mask

    def example(kept):
        mask = torch.ones(4, 16, dtype=torch.long)
        mask[0, kept:] = 0
        return {"x": torch.randn(4, 16), "attention_mask": mask}

    source = SimpleNamespace(inputs=[example(16), example(16), example(5), example(9)], model=Masked())
    plain, padded = _kinds(source, None)
    assert all(bool(plain.next_call().kwargs["attention_mask"].all()) for _ in range(8))
    assert not any(bool(padded.next_call().kwargs["attention_mask"].all()) for _ in range(8))


def test_what_a_contender_does_while_it_is_prepared_is_its_own():
    def changes(model, example):
        example["input"].zero_()
        torch.set_default_dtype(torch.float64)
        return lambda inputs: model(**inputs)

    seen = []

    def looks(model, example):
        seen.append((float(example["input"].sum()), torch.get_default_dtype()))
        return lambda inputs: model(**inputs)

    found = [eager(), Entrant("changes", changes), Entrant("looks", looks)]
    draw = lambda: Call((torch.ones(2, 4),))  # noqa: E731
    contest(torch.nn.Linear(4, 4), found, draw, seconds=0.0, rounds=5, tell=lambda text: None)
    assert seen == [(8.0, torch.float32)] and torch.get_default_dtype() is torch.float32


def test_a_model_that_does_not_run_itself_is_an_error_before_anybody_is_prepared():
    found = [eager(), Entrant("other", lambda model, example: pytest.fail("it was prepared"))]
    with pytest.raises(CommandError, match="does not run on these inputs: RuntimeError"):
        contest(
            torch.nn.Linear(4, 4),
            found,
            lambda: Call((torch.ones(2, 5),)),
            seconds=0.0,
            tell=lambda text: None,
        )


def test_inputs_get_the_names_of_the_forward():
    class Net(torch.nn.Module):
        def forward(self, x, mask=None, **rest):
            return x

    x = torch.ones(1)
    assert by_name(Net(), Call((x,), {"extra": 1})) == {"x": x, "extra": 1}


def test_bench_prints_every_contender_with_machine_and_versions(kpt_cli, model_file, optimized):
    path, arch = model_file
    options = (
        "bench",
        "--model",
        path,
        "--arch",
        arch,
        "--inputs",
        INPUTS,
        "--seconds",
        "0.1",
        "--no-plugins",
    )
    answer = kpt_cli(*options, "--json")
    assert answer.code == 0, answer.err
    data = answer.json
    assert [entry["name"] for entry in data["contenders"]] == ["eager", "kpt"]
    assert all(entry["state"] == "ran" and entry["seconds"] > 0 for entry in data["contenders"])
    assert data["versions"]["torch"] == torch.__version__ and data["machine"]["profile"]["name"]
    headline = receipt().headline()
    assert [entry["note"] for entry in data["contenders"]] == ["", headline]
    shown = kpt_cli(*options).out
    assert "vs eager" in shown and f"kpt prepared {headline}" in " ".join(shown.split())
    assert kpt_cli(*options, "--contenders", "nobody").code == 2


@pytest.mark.parametrize(
    "wrong", [("--seconds", "-4"), ("--seconds", "0"), ("--seconds", "inf"), ("--budget", "0")]
)
def test_bench_refuses_times_that_are_none_before_anything_runs(wrong, kpt_cli, model_file, optimized):
    path, arch = model_file
    answer = kpt_cli("bench", "--model", path, "--arch", arch, "--inputs", INPUTS, "--json", *wrong)
    assert answer.code == 2 and answer.json["code"] == "usage"
    assert f"{wrong[0]} {wrong[1]} is not a number of seconds above 0" in answer.json["message"]
    assert wrong[0] in answer.json["hint"] and not optimized
    assert kpt_cli("bench", "--tune", *wrong).code == 2


def test_contenders_of_plugins_take_part_or_say_what_they_lack():
    from kpt.cli.contest import installed
    from kpt.specs import ContenderSpec

    class Plugin:
        @kpt.hookimpl
        def kpt_contenders(self):
            yield ContenderSpec("lacking", "math:sqrt", requires=("not_there_42", "json"))
            yield ContenderSpec("present", "math:sqrt", requires=("json",))
            yield ContenderSpec("eager", "math:sqrt")

    found = {entrant.name: entrant for entrant in installed(registry([Plugin()]))}
    assert found["lacking"].absent == "needs not_there_42" and not found["present"].absent
    assert "needs another name" in found["eager"].absent
