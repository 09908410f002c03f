"""A plan that is known before: what the request or the cache has, and its application without a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kpt.judge import kinds
from kpt.transaction import conclusion, recipe
from kpt.transaction.events import emit
from kpt.transaction.ledger import Found
from kpt.transaction.plan import Plan
from kpt.transaction.propose import rebuild
from kpt.transaction.receipt import Entry

if TYPE_CHECKING:
    from kpt.transaction.observe import Observation
    from kpt.transaction.outcome import Outcome
    from kpt.transaction.request import Run
    from kpt.transaction.trial import Trials

#: Mixtures of calls on which nothing paid, that the cache keeps beside the last.
_MIXTURES = 7


def recipe_for(run: Run, observation: Observation) -> dict[str, Any] | None:
    """The recipe that the request gives, or the cache has for it; None, with the receipt saying why."""
    request, receipt = run.request, run.receipt
    facts = {
        "fuel": request.fuel,
        "plugins": _selection_key(request.selection),
        "accuracy": request.accuracy is not None,
    }
    run.key = recipe.key_of(observation, request.registry, facts)
    run.kinds = kinds.described(observation.spec)
    if request.plan is not None:
        receipt.recipe = "given"
        return request.plan
    if not request.cache:
        receipt.recipe = "cache off"
        return None
    data, receipt.recipe = recipe.read(run.key)
    if data is not None and not observation.deterministic:
        data = _for_these_calls(data, run)
        receipt.recipe = "hit" if data is not None else "it found nothing for another mixture of calls"
    if data is not None and _unfinished(data, request.budget):
        if data["steps"] and not observation.deterministic:
            run.outpaced = data  # where nothing better is found on these calls, it stays for others
        data, receipt.recipe = None, "found within a smaller budget, which did not suffice for every variant"
    if receipt.recipe not in ("hit", "miss"):
        receipt.notes.append(f"the cached recipe was not used: {receipt.recipe}")
    return data


def _for_these_calls(data: dict[str, Any], run: Run) -> dict[str, Any] | None:
    """What a recipe says of this run's mixture of calls; None if that is nothing.

    A recipe keeps, beside a plan or none, the mixtures on which nothing paid, so that the cache answers for
    several programs with the same model. A plan of another mixture is timed on this one's calls.
    """
    known = data.get("figures", {}).get("mixtures", [])
    others = [each for each in known if not kinds.alike(each, run.kinds)]
    run.known_mixtures = others[-_MIXTURES:]
    if len(others) == len(known):
        return data if data["steps"] else None
    if not data["steps"]:
        return data
    run.keeps_recipe = True
    reason = "nothing paid for itself on calls like these before; on others something does"
    return recipe.to_dict(Plan(), run.key, {"reason": reason, "mixtures": known})


def _unfinished(data: dict[str, Any], budget: float) -> bool:
    """Whether the search behind a recipe ran out of time and would now have more."""
    figures = data.get("figures", {})
    had = figures.get("budget")
    return (
        isinstance(had, (int, float))
        and had < budget
        and any(entry.get("rule") in ("budget", "deadline") for entry in figures.get("rejected", []))
    )


def _selection_key(selection: Sequence[Any] | None) -> Any:
    if selection is None:
        return None
    return [
        item if isinstance(item, str) else f"{type(item).__qualname__}:{getattr(item, '__name__', '')}"
        for item in selection
    ]


def apply(run: Run, trials: Trials, data: dict[str, Any], *, timed: bool = True) -> bool:
    """Apply a recipe and judge it, without searching; False when a search has to follow."""
    if run.receipt.recipe == "hit" and run.request.budget <= _not_within(data):
        run.keeps_recipe = _with_less(run, data)
        run.outpaced, run.untried = data, True
        run.receipt.notes.append(
            f"the recipe of the cache was not tried: before, it could not be set up with a budget of "
            f"{_not_within(data):g} s"
        )
        return False
    try:
        with run.budget.limit(), trials.kept.untouched():
            plan, skipped = rebuild(recipe.check(data), trials.observation, run.request.registry)
    except recipe.RecipeError as error:
        run.receipt.notes.append(f"the recipe was not used: {error}")
        run.keeps_recipe = _with_less(run, data) and trials.observation.unfinished_proofs > 0
        return False
    run.receipt.skipped = skipped
    if not plan.steps:
        run.receipt.reason = str(data.get("figures", {}).get("reason") or "nothing paid for itself before")
        run.receipt.rejected = [Entry(**entry) for entry in data.get("figures", {}).get("rejected", [])]
        run.receipt.recipe_data = data
        return True
    emit("trial", f"applying the recipe {plan.key}", seconds=run.budget.spent(), budget=run.budget.seconds)
    fixed = trials.observation.deterministic
    with run.budget.overtime(conclusion.overtime(run)):
        outcome = trials.run(plan, keep=True, timed=False, final=True)  # there is no other to choose
    if not outcome.right or outcome.applied is None:
        outcome.close()
        return _refused(run, outcome, data, fixed=fixed)
    figures = data.get("figures", {})
    gains, doubts = dict(figures.get("gains", {})), dict(figures.get("doubts", {}))
    found = Found(best=outcome, gains=gains, doubts=doubts)
    found.rejected = [Entry(**entry) for entry in figures.get("rejected", [])]
    conclusion.commit_best(run, trials, found, timed=timed)
    if fixed and run.committed is None:
        _store_veto(run)
    last = found.rejected[-1].rule if found.rejected else ""
    late = last == "deadline"
    if run.committed is None and last == "slower" and run.receipt.recipe == "hit":
        run.outpaced = data
    if run.committed is None and late and not fixed and run.receipt.recipe == "hit":
        return _too_late(run, plan.key, data)
    return run.committed is not None or fixed


def _refused(run: Run, outcome: Outcome, data: dict[str, Any], *, fixed: bool) -> bool:
    """Say why a recipe does not serve; False when a search has to follow."""
    plan, late = outcome.plan, outcome.rule in ("budget", "deadline")
    run.receipt.rejected = [
        Entry(step.name, step.phase, step.plugin, outcome.rule, outcome.reason, None, outcome.figures)
        for step in plan.steps
    ]
    if fixed and late:  # a search would find another plan, by the clock
        run.receipt.reason = f"the recipe {plan.key} was stopped ({outcome.reason})"
        _store_veto(run)
        return True
    if late and run.receipt.recipe == "hit":
        return _too_late(run, plan.key, data)
    run.receipt.notes.append(f"the recipe {plan.key} did not hold ({outcome.rule}: {outcome.reason})")
    if run.receipt.recipe == "hit":  # one that was given, by the user or by rank 0, is not the cache's
        recipe.forget(run.key)
    return False


def _with_less(run: Run, data: dict[str, Any]) -> bool:
    """Whether a recipe of the cache was found within a larger budget than this run has."""
    had = data.get("figures", {}).get("budget")
    return run.receipt.recipe == "hit" and isinstance(had, (int, float)) and run.request.budget < had


def _not_within(data: dict[str, Any]) -> float:
    """The largest budget within which a recipe was tried in vain; 0 if there is none."""
    found = data.get("figures", {}).get("not_within")
    return float(found) if isinstance(found, (int, float)) else 0.0


def _too_late(run: Run, key: str, data: dict[str, Any]) -> bool:
    """Say that a recipe of the cache needs more time than there was: it holds as it did, and stays there.

    Nothing is left for a search, which would find less. Next time, with as little, there is one at once.
    """
    known = data.get("figures", {})
    found = known.get("budget")
    had = f" with budget={found:g}" if isinstance(found, (int, float)) else ""
    figures = {**known, "not_within": max(run.request.budget, _not_within(data))}
    if (problem := recipe.write(run.key, {**data, "figures": figures})) is not None:
        run.receipt.notes.append(problem)
    run.receipt.reason = (
        f"the recipe {key}, which was found{had}, could not be set up and judged with "
        f"budget={run.budget.seconds:g}; it is kept, so call kpt.optimize again with a larger budget, or "
        "with this one to search"
    )
    return True


def _store_veto(run: Run) -> None:
    """In torch's deterministic mode, keep that a plan of the cache was refused: the clock of the next process
    might let it pass, and the bits of the two would differ."""
    if run.receipt.recipe == "hit":
        conclusion.store(run, fixed=True)
