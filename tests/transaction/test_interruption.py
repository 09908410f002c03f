"""Budgets, Ctrl-C and memory: a run that is stopped leaves the model as it was."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

import fingerprints
import hostile_passes
import kpt
import slow_models
import stopping_passes as stopping
from fingerprints import optimized
from kpt import interruption
from kpt.transaction import events
from slow_models import DirectScale, net, plugin


def model_in_mid_life(training: bool = False) -> torch.nn.Module:
    model = net(training=True)
    model(torch.randn(8, 16)).sum().backward()
    return model.train(training)


def name(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else None


def stays_the_same(model: torch.nn.Module, run) -> None:
    """``run()`` changes nothing about the model or the process, and the model can be optimised afterwards."""
    model_before, process_before = fingerprints.of_model(model), fingerprints.of_process()
    run()
    assert fingerprints.differences(process_before, fingerprints.of_process()) == []
    assert fingerprints.differences(model_before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == []
    optimized(model, torch.randn(32, 16), plugins=[plugin(DirectScale)])


@pytest.mark.parametrize(
    "offered",
    [
        stopping.Sleeps,
        stopping.WaitsInForward,
        stopping.SleepsInSteps,
        stopping.Loops,
        stopping.SwallowsEverything,
        stopping.ProposesForEver,
    ],
    ids=name,
)
def test_the_budget_holds(offered):
    model, example = model_in_mid_life(), torch.randn(32, 16)

    def run() -> None:
        started = time.monotonic()
        kpt.optimize(model, example, plugins=[plugin(offered)], budget=3.0, cache=False)
        # 10 % of the budget, and what a machine shared with other tests needs to get a turn.
        assert time.monotonic() - started < 3.3 + 3.0
        receipt = kpt.report(model)
        assert not receipt.optimized
        stopped = [entry.rule for entry in receipt.rejected] or [receipt.reason]
        assert all(rule in ("deadline", "budget") or "budget" in rule for rule in stopped), receipt.rejected

    stays_the_same(model, run)


@pytest.mark.slow
def test_the_budget_holds_where_a_real_compiler_overruns_it():
    """Inductor on hundreds of layers: it writes, schedules and compiles C++ for longer than there is.

    What this process computes once the budget is over is at most a tenth of it. Other processes that keep it
    from computing do not count, so that this holds on a busy machine, too.
    """
    model, example = slow_models.deep(1200), torch.randn(8, 16)
    before, expected = fingerprints.of_model(model), model(example)
    budget = 20.0
    computed: list[float] = []
    over = threading.Timer(budget, lambda: computed.append(time.process_time()))
    over.start()
    try:
        compiler = plugin(slow_models.WholeByInductor, phase="compile")
        kpt.optimize(model, example, plugins=[compiler], budget=budget, cache=False)
        late = time.process_time() - computed[0] if computed else 0.0
    finally:
        over.cancel()
    receipt = kpt.report(model)
    rules = [(entry.name, entry.rule) for entry in receipt.rejected]
    assert rules == [("WholeByInductor:whole", "deadline")], receipt.reason
    (trial,) = receipt.trials
    assert trial["seconds"] > 0.5 * budget, "the compiler was not at work for most of the budget"
    assert late < 0.1 * budget
    assert not interruption.descendants(), "a compiler's process outlives the budget"
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert fingerprints.ours(model) == [] and torch.equal(model(example), expected)


def test_a_trial_that_overruns_does_not_take_the_others_down():
    model, example = model_in_mid_life(), torch.randn(32, 16)
    optimized(model, example, plugins=[plugin(stopping.Loops, DirectScale)], budget=15.0)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert [entry.name for entry in receipt.rejected] == ["Loops:direct"]


def test_a_budget_too_small_for_anything_returns_the_model():
    model, example = model_in_mid_life(), torch.randn(32, 16)

    def run() -> None:
        kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=1e-3, cache=False)
        assert not kpt.report(model).optimized and "budget" in kpt.report(model).reason

    stays_the_same(model, run)


@pytest.mark.parametrize(
    "offered",
    [
        stopping.InterruptsApply,
        stopping.InterruptsForward,
        stopping.InterruptsUndo,
        stopping.SignalsItself,
    ],
    ids=name,
)
@pytest.mark.parametrize("training", [False, True])
def test_ctrl_c_in_a_trial(offered, training):
    model, example = model_in_mid_life(training), torch.randn(32, 16)

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            kpt.optimize(model, example, plugins=[plugin(offered)], budget=20.0, cache=False)

    stays_the_same(model, run)


@pytest.mark.parametrize("stage", ["observe", "baseline", "propose", "trial", "commit"])
def test_ctrl_c_in_every_stage(stage):
    model, example = model_in_mid_life(), torch.randn(32, 16)

    def interrupt(event: dict) -> None:
        if event["kind"] == stage:
            raise KeyboardInterrupt

    def run() -> None:
        with pytest.raises(KeyboardInterrupt), events.listen(interrupt):
            kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=20.0, cache=False)

    stays_the_same(model, run)


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1, 0.2, 0.4])
def test_a_signal_at_any_moment(delay):
    """The model is as it was, or (if the run was faster than the signal) optimised; nothing in between."""
    model, example = model_in_mid_life(), torch.randn(32, 16)
    # From here on all is imported: an import that is interrupted leaves half a module, whoever asked for it.
    kpt.restore(optimized(model, example, plugins=[plugin(DirectScale)]))
    before, expected = fingerprints.of_model(model), model(example)
    process_before = fingerprints.of_process()
    timer = threading.Timer(delay, signal.raise_signal, [signal.SIGINT])
    finished = False
    try:
        timer.start()
        kpt.optimize(model, example, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
        finished = True
        timer.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    finally:
        timer.cancel()
    if finished:
        kpt.restore(model)
    assert fingerprints.differences(process_before, fingerprints.of_process()) == []
    assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert torch.equal(model(example), expected)


@pytest.mark.parametrize("offered", [hostile_passes.OutOfMemory, hostile_passes.HostMemory], ids=name)
def test_running_out_of_memory_ends_that_trial_only(offered):
    model = model_in_mid_life()
    optimized(model, torch.randn(32, 16), plugins=[plugin(offered, DirectScale)])
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert [entry.rule for entry in receipt.rejected] == ["memory"]


def test_one_search_at_a_time():
    """Two threads that optimise two models wait for one another."""
    models = [model_in_mid_life() for _ in range(2)]
    active, most = [0], [0]

    def watch(event: dict) -> None:
        active[0] += {"observe": 1, "done": -1}.get(event["kind"], 0)
        most[0] = max(most[0], active[0])

    def work(model: torch.nn.Module) -> None:
        kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0, cache=False)

    with events.listen(watch):
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert most[0] == 1 and all(kpt.report(model).optimized for model in models)
