"""What the user asked for, and what one run of it has come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge.calls import Call
from kpt.transaction.budget import Budget
from kpt.transaction.commit import Committed
from kpt.transaction.observe import mode_of
from kpt.transaction.receipt import Receipt

if TYPE_CHECKING:
    from kpt.specs import Level, Objective
    from kpt.transaction.accuracy import Accuracy


@dataclass
class Request:
    """What the user asked for. ``examples`` are kept (copied) for `kpt.refresh`.

    ``plan`` is a recipe to apply instead of searching; ``only_plan`` forbids the search that follows
    when it does not hold.
    """

    registry: Any
    selection: Sequence[Any] | None
    level: Level
    objective: Objective
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None
    accuracy: Accuracy | None
    budget: float
    trackers: Sequence[Any]
    cache: bool
    fuel: int | None
    examples: list[Call] | None = None
    plan: dict[str, Any] | None = None
    only_plan: bool = False

    def again(self, receipt: Receipt | None) -> Request:
        """The same request for the plan that was found before, if there was one."""
        found = receipt.recipe_data if receipt is not None else None
        return replace(self, plan=found)


class Run:
    """The state of one run."""

    def __init__(self, model: torch.nn.Module, request: Request) -> None:
        self.model = model
        self.request = request
        self.budget = Budget(float(request.budget))
        self.receipt = Receipt(
            model=type(model).__name__,
            mode=mode_of(model),
            level=request.level,
            objective=request.objective,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        self.key = ""
        #: What kinds of calls the examples are, which a verdict that nothing pays holds for.
        self.kinds: list[list[Any]] = []
        #: Others on which nothing paid, as the cache has it.
        self.known_mixtures: list[Any] = []
        #: The recipe of the cache that stays for other calls than this run's, if nothing pays on those: its
        #: plan was right and not faster on them, or it was found within a smaller budget, or comes too late.
        self.outpaced: dict[str, Any] | None = None
        #: Whether that was not tried on this run's calls, so that it may pay on them too.
        self.untried = False
        self.committed: Committed | None = None
        #: Whether the cache holds a plan that a larger budget found: what this run finds does not replace it.
        self.keeps_recipe = False
        #: Whether the committed plan was judged with no size but the examples', as eager refused all others.
        self.only_examples = False
