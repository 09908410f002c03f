"""The hypotheses about one site, and the runs that refute them: its own code beside the reference."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from kpt.ops.binding import Binding, Hypothesis
from kpt.ops.captured import Captured
from kpt.ops.comparison import difference, tensors, versions_of
from kpt.ops.constants import constants
from kpt.ops.examples import Examples
from kpt.ops.promote import Promoted

#: Relative to the largest value. fp64 noise is 1e-12 here; eps = 1e-6 instead of 1e-5 is 5e-6.
TOLERANCE = 1e-9


class Unproved(Exception):
    """Ends a proof; the message is the reason."""


class OutOfTime(Unproved):
    """The deadline passed."""


class Claims:
    """The hypotheses about one site that nothing has refuted so far, each with its binding.

    ``reads`` collects the attributes that a function reads of the module that calls it.
    """

    def __init__(
        self,
        captured: Captured,
        hypotheses: Sequence[Hypothesis],
        reference: Callable[[str], Callable[..., Any]],
        deadline: float | None,
        shrink: bool,
        straight: bool,
    ) -> None:
        self.captured = captured
        self.reference = reference
        self.deadline = deadline
        self.straight = straight
        self.examples = Examples(captured, shrink and not straight, straight)
        self.candidates = [
            (hypothesis, Binding(hypothesis, captured.signature, constants(captured, hypothesis)))
            for hypothesis in hypotheses
        ]
        for hypothesis in hypotheses:
            for name, (_, high) in hypothesis.integers.items():
                self.examples.limits.setdefault(name, set()).add(high)
        self.reads: set[str] = set()

    @property
    def first(self) -> Binding:
        """The binding of the first candidate: that of the claim, once there is only one."""
        return self.candidates[0][1]

    def check_time(self) -> None:
        """Raise `OutOfTime` once the deadline has passed."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime("the time for recognition was over")

    def call(self, twin: torch.nn.Module, bound: dict[str, Any]) -> Any:
        """What the site's own code returns on ``twin``, a copy of its module."""
        arguments = inspect.BoundArguments(self.captured.signature, dict(bound))  # type: ignore[arg-type]
        if self.captured.function is None:
            return twin.forward(*arguments.args, **arguments.kwargs)
        if not any(value is twin for value in bound.values()):
            return self.captured.function(*arguments.args, **arguments.kwargs)
        with _recorded(twin, self.reads):
            return self.captured.function(*arguments.args, **arguments.kwargs)

    def claim(self, twin: torch.nn.Module, bound: dict[str, Any], binding: Binding) -> Any:
        """What the op's reference returns where ``binding`` puts it in place of the site's code."""
        arguments = inspect.BoundArguments(self.captured.signature, dict(bound))  # type: ignore[arg-type]
        # references keep float64 as it is; only a binding that casts needs to be promoted, which is slow
        claim = binding.hypothesis
        texts = (*claim.values.values(), *claim.arguments.values(), claim.output)
        casts = any(".float()" in text or ".to(" in text for text in texts)
        wide = any(value.dtype == torch.float64 for value in tensors(bound))
        with Promoted() if casts and wide else nullcontext():
            return binding.run(twin, self.reference(binding.op), *arguments.args, **arguments.kwargs)

    def filter(self, twin: torch.nn.Module, bound: dict[str, Any], what: str) -> Any:
        """Run the site on ``bound`` in fp64 and drop the hypotheses that disagree."""
        self.check_time()
        versions = versions_of(twin, bound)
        with Promoted():
            out = self.call(twin, bound)
        if versions != versions_of(twin, bound):
            raise Unproved("it writes to its inputs, parameters or buffers")
        survivors = []
        nearest, nearest_error = "", float("inf")
        for hypothesis, binding in self.candidates:
            try:
                claimed = self.claim(twin, bound, binding)
                error = difference(out, claimed)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failure:
                if isinstance(failure, Unproved):
                    raise
                error = float("inf")
            if error <= TOLERANCE:
                survivors.append((hypothesis, binding))
            elif error < nearest_error:
                nearest, nearest_error = hypothesis.describe(), error
        if not survivors:
            closest = f"; nearest was {nearest}, off by {nearest_error:.1e}" if nearest else ""
            raise Unproved(f"it computes something else {what}{closest}")
        self.candidates = survivors
        return out


@contextmanager
def _recorded(twin: torch.nn.Module, reads: set[str]) -> Iterator[None]:
    """Note which attributes of ``twin`` are read."""
    cls: Any = type(twin)

    def read(self: Any, name: str) -> Any:
        if self is twin and not name.startswith("__"):
            reads.add(name)
        return cls.__getattribute__(self, name)

    twin.__class__ = type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})
    try:
        yield
    finally:
        twin.__class__ = cls


def short(error: BaseException) -> str:
    """The first line of an error's message, for a reason."""
    text = str(error).strip().splitlines()
    return text[0][:160] if text else ""
