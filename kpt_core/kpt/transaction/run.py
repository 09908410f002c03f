"""One run: observe, baseline, propose, search or recipe, commit, receipt."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from kpt import compiling, interruption, profiles
from kpt.judge.calls import Call
from kpt.judge.draws import InputSpec
from kpt.judge.state import ModelState, untouched
from kpt.transaction import conclusion, distributed, going_on, hooks, recipe, remembered
from kpt.transaction.baseline import Baseline
from kpt.transaction.budget import BudgetSpent
from kpt.transaction.dispatch import original_forward
from kpt.transaction.events import emit
from kpt.transaction.freememory import free_memory
from kpt.transaction.ledger import Ledger
from kpt.transaction.observe import (
    Observation,
    Unsuitable,
    device_of,
    observe,
    prepare_calls,
    refuse_unsuitable,
)
from kpt.transaction.plan import Proposals
from kpt.transaction.propose import propose
from kpt.transaction.receipt import Receipt
from kpt.transaction.request import Request, Run
from kpt.transaction.search import Search
from kpt.transaction.trial import Trials
from kpt.transaction.workspace import WorkspaceError


def execute(model: torch.nn.Module, example_inputs: Any, request: Request) -> Receipt:
    """Optimise ``model`` in place and return the receipt.

    Raises:
        TypeError, ValueError: the examples are of no known form, or on another device.
        Exception: what the model itself raises on an example, or the user's metric raises. The model is
            then as it was.
    """
    with distributed.ranks(float(request.budget)) as ranks, hooks.silent(model):
        return _execute(model, example_inputs, request, ranks)


def _execute(
    model: torch.nn.Module, example_inputs: Any, request: Request, ranks: distributed.Ranks | None
) -> Receipt:
    try:
        refuse_unsuitable(model)
        calls = prepare_calls(model, example_inputs)
    except Unsuitable as error:
        receipt = Run(model, request).receipt
        receipt.reason = str(error)
        return receipt
    spec = InputSpec.from_calls(calls, request.dynamic_shapes, original_forward(model))
    request.examples = calls
    run = Run(model, request)
    started = time.perf_counter()
    state = ModelState(model, limit_bytes=int(0.25 * free_memory(device_of(model).type)))
    try:
        # A graph that waits for its backward must not find the buffers written, now that they are back.
        with untouched(), _versions_kept(model), interruption.contained():
            _transact(run, calls, spec, state, ranks)
        if run.committed is not None:
            run.committed.watch.settle()
    except (Unsuitable, WorkspaceError) as error:
        run.receipt.reason = str(error)
        _put_back(state)  # it was called to find out
    except (BudgetSpent, compiling.DeadlinePassed):
        run.receipt.reason = f"the budget of {run.budget.seconds:g} s was spent before a plan was proven"
        _take_back(run)
        _put_back(state)
    except BaseException:
        _take_back(run)
        _put_back(state)
        raise
    total = time.perf_counter() - started
    run.receipt.search_seconds = max(0.0, total - run.receipt.setup_seconds)
    emit("done", run.receipt.headline(), seconds=run.budget.spent(), budget=run.budget.seconds)
    try:
        conclusion.track(run)
    except BaseException:  # a Ctrl-C, which leaves no receipt behind
        _take_back(run)
        raise
    return run.receipt


def _versions_kept(model: torch.nn.Module) -> Any:
    """Put the version counters of all tensors back, as their bits are."""
    tensors = tuple(t for t in (*model.parameters(), *model.buffers()) if not t.is_inference())
    return torch.autograd._unsafe_preserve_version_counter(tensors)


def _put_back(state: ModelState) -> None:
    """An interruption may hit the very code that puts things back; here it is over."""
    if state.differences():
        state.restore()


def _take_back(run: Run) -> None:
    if run.committed is not None:
        run.committed.take_back(in_run=True)
        run.committed = None


def _transact(
    run: Run, calls: list[Call], spec: InputSpec, state: ModelState, ranks: distributed.Ranks | None
) -> None:
    request, receipt, budget = run.request, run.receipt, run.budget
    began = budget.spent()
    hardware = profiles.hardware(device_of(run.model), registry=request.registry)
    probed = budget.spent() - began  # measured once on a machine, and kept
    emit("observe", f"observing {receipt.model}", seconds=budget.spent(), budget=budget.seconds)
    with budget.limit():
        observation, plain = observe(
            run.model,
            calls,
            spec,
            level=request.level,
            objective=request.objective,
            hardware=hardware,
            registry=request.registry,
            deadline=budget,
        )
    _describe(receipt, observation, request)
    emit("baseline", "storing the reference", seconds=budget.spent(), budget=budget.seconds)
    with budget.limit():
        baseline = Baseline(observation, plain, seed=_seed(observation))
    receipt.baseline.update(reference_dtype=baseline.reference_dtype, note=baseline.reference_note)
    trials = Trials(observation, baseline, budget, state, accuracy=request.accuracy, probed=probed)
    receipt.baseline.update(callers=trials.load.callers, queued=trials.load.queued)
    try:
        if ranks is not None:
            _together(run, trials, ranks)
        else:
            _alone(run, trials)
    finally:
        baseline.close()
        receipt.notes.extend(trials.undo_errors)
        if run.committed is not None and run.only_examples:
            receipt.notes.append(
                "only the examples' sizes were judged: the model refuses all others that were tried of its "
                "declared dimensions"
            )
        changed = sorted({*trials.kept.damage, *trials.kept.patched})
        if changed:
            receipt.notes.append("put back after a trial had changed it: " + ", ".join(changed[:8]))


def _alone(run: Run, trials: Trials) -> None:
    """The recipe if there is one that still holds, else the search."""
    data = remembered.recipe_for(run, trials.observation)
    if data is not None and remembered.apply(run, trials, data):
        return
    if run.request.only_plan:
        run.receipt.reason = run.receipt.reason or "; ".join(run.receipt.notes) or "the recipe does not hold"
        return
    _search(run, trials)


def _together(run: Run, trials: Trials, ranks: distributed.Ranks) -> None:
    """Rank 0 decides; all apply the same recipe, or none does."""
    receipt = run.receipt
    if not ranks.ready(True):
        receipt.reason = "another rank could not observe its model, so no rank is optimised"
        return
    decided: dict[str, Any] | None = None
    if distributed.rank() == 0:
        _alone(run, trials)
        decided = {"recipe": receipt.recipe_data, "reason": receipt.reason}
    decided = ranks.share(decided) or {}
    found = decided.get("recipe")
    nothing = not found or not found.get("steps")
    if distributed.rank() != 0:
        run.budget.restart()  # spent by waiting for rank 0
        receipt.reason = str(decided.get("reason") or "")
        if found:
            remembered.apply(run, trials, found, timed=False)
    if ranks.done(nothing or run.committed is not None):
        return
    if run.committed is not None or nothing:
        receipt.reason = "another rank could not apply the plan, so no rank does"
    else:
        receipt.reason = receipt.reason or "; ".join(receipt.notes)
    _take_back(run)
    receipt.status = "original"
    receipt.accepted, receipt.patches, receipt.watched_tensors, receipt.derived_bytes = [], [], 0, 0
    receipt.speedup = receipt.speedup_low = receipt.speedup_high = 1.0
    receipt.kinds, receipt.confidence = [], 0.95


def _seed(observation: Observation) -> int:
    """Fresh inputs in every run; fixed ones where the user demands determinism."""
    return 0 if observation.deterministic else time.time_ns() % (1 << 31)


def _describe(receipt: Receipt, observation: Observation, request: Request) -> None:
    receipt.mode = observation.mode
    receipt.hardware = profiles.to_dict(observation.hardware)
    receipt.versions = recipe.versions(request.registry)
    receipt.inputs = observation.spec.to_dict()
    receipt.sites = [site.to_dict() for site in observation.sites]
    if observation.unfinished_proofs:
        receipt.notes.append(
            f"{observation.unfinished_proofs} modules or functions were not recognised for lack of time, so "
            "that no kernel was tried there; a larger budget, or a machine with less to do, gives it"
        )
    receipt.left_alone = [list(entry) for entry in observation.left_alone]
    receipt.baseline = {"seconds": observation.baseline_seconds, "operations": observation.operations}
    receipt.seconds_before = receipt.seconds_after = observation.baseline_seconds


def _search(run: Run, trials: Trials) -> None:
    request, receipt, budget = run.request, run.receipt, run.budget
    emit("propose", "asking plugins for variants", seconds=budget.spent(), budget=budget.seconds)
    with budget.limit(), trials.kept.untouched():
        proposals: Proposals = propose(trials.observation, request.registry)
    receipt.skipped = proposals.skipped
    receipt.searched = True
    ledger: Ledger | None = Ledger(trials, proposals.candidates, budget, fuel=request.fuel)
    while ledger is not None:
        found = Search(ledger).run()
        receipt.rejected = found.rejected
        receipt.notes.extend(found.notes)
        receipt.trials = [outcome.to_dict() for outcome in trials.log]
        if found.best is None:
            receipt.reason = conclusion.why_nothing(receipt, proposals)
            break
        ledger = conclusion.commit_best(run, trials, found, instead=functools.partial(going_on.after, ledger))
    conclusion.store(run, fixed=trials.observation.deterministic)
