"""The user's own measure of quality, which outranks the referee's tolerances."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Accuracy:
    """A metric of the model and the largest drop that is acceptable.

    ``metric(model)`` returns a number; higher is better unless ``higher_is_better=False``.
    ``max_drop`` is absolute and in the metric's own unit.

    Raises:
        TypeError: ``metric`` is not callable, or ``max_drop`` is no number.
        ValueError: ``max_drop`` is negative or not finite.
    """

    metric: Callable[[torch.nn.Module], Any]
    max_drop: float = 0.0
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise TypeError(
                f"Accuracy(metric=...) got {type(self.metric).__name__}; pass a function that takes the "
                "model and returns a number"
            )
        drop = self.max_drop
        if isinstance(drop, (str, bool)) or not isinstance(drop, SupportsFloat):
            raise TypeError(f"Accuracy(max_drop={drop!r}) got {type(drop).__name__}; pass a number >= 0")
        if not 0.0 <= float(drop) < float("inf"):
            raise ValueError(f"Accuracy(max_drop={self.max_drop}) must be a finite number >= 0")

    def measure(self, model: torch.nn.Module) -> float:
        """The metric of ``model`` as a float; a result that is not a number is a TypeError."""
        value = self.metric(model)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the accuracy metric returned {type(value).__name__}; it has to return one number"
            ) from error

    def before(self, value: float) -> float:
        """``value``, which the untouched model got. NaN is a ValueError: it would refuse every plan."""
        if math.isnan(value):
            raise ValueError(
                "the accuracy metric returned NaN for the untouched model, with which no plan can be "
                "compared; call metric(model) yourself and mend it (no samples, or zero divided by zero?)"
            )
        return value

    def drop(self, before: float, after: float) -> float:
        """How much worse ``after`` is; infinite where the two cannot be compared, one being no number."""
        if before == after:  # both infinite, too
            return 0.0
        drop = before - after if self.higher_is_better else after - before
        return float("inf") if drop != drop else drop
