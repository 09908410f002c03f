"""The calls that plans are judged on: fresh ones, of which the untouched model gives the results.

They are like the examples, then of odd and boundary sizes of the declared dimensions, then padded for a plan
that touches a mask, and where a mask or a flag of the examples is the same everywhere. So are integers that
may be flags, where eager takes others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kpt import compiling
from kpt.judge import outputs
from kpt.transaction.counts import Counts

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.transaction.baseline import Baseline, Expected
    from kpt.transaction.observe import Observation

_STOPS = (KeyboardInterrupt, compiling.DeadlinePassed, MemoryError)


@dataclass(frozen=True)
class Draw:
    """One fresh call and the rule that a failure on it is reported under.

    ``sizes``, ``padding`` and ``mixed`` are how it was drawn, so that others like it can be.
    """

    expected: Expected
    rule: str
    label: str
    seed: int
    sizes: dict[str, int] | None = None
    padding: bool = False
    mixed: bool = False


class FreshCalls:
    """Draws calls of one observation, and has its baseline make them."""

    def __init__(self, observation: Observation, baseline: Baseline) -> None:
        self.observation = observation
        self.baseline = baseline
        self.counts = Counts(baseline.plain)
        #: Numbers outside of tensors that moved when the untouched model was called, in any draw so far.
        self.moved: set[str] = set()
        self.dropped = 0
        #: Whether eager refused every other size of the declared dimensions that the last draws tried.
        self.only_examples = False
        self._seed = 1000
        #: Whether integers that are all 0 or all 1 in the examples are drawn otherwise. On an accelerator an
        #: index that is out of range would end the process's use of it.
        self._mixes = observation.device_type == "cpu" and observation.spec.has_constant_integers

    @functools.cached_property
    def _telling(self) -> list[int] | None:
        """The examples that calls are drawn like; None for all.

        Where no output holds an element whatever is wrong is right. Such examples are run, and not judged by.
        """
        spec = self.observation.spec
        silent = {n for n, call in spec.examples_with_empty_tensors().items() if not self._tells(call)}
        positions = [n for n in range(len(spec.examples)) if n not in silent]
        return positions if silent and positions else None

    def _tells(self, call: Call) -> bool:
        found = outputs.tensors(self.baseline.expected(call, seed=self._seed).eager.output)
        return not found or any(tensor.numel() for tensor in found.values())

    def draws(self, *, touches_mask: bool, thorough: bool) -> list[Draw]:
        """Fresh calls with their expected results. What eager cannot run is dropped; of a padded call the
        unpadded form takes the place."""
        observation = self.observation
        mixed = self._mixed()
        # In a first look, what is drawn otherwise takes the place of the second draw.
        kinds: list[tuple[str, str, dict[str, int] | None, bool]] = [
            ("value", "like the example", None, False)
        ] * (2 if thorough or mixed is None else 1)
        if observation.dynamic:
            # Odd ones, then both bounds of each dimension.
            number = 1 + 2 * len(observation.spec.dimensions) if thorough else 2
            for odd in observation.spec.sizes(self.baseline.generator, number):
                kinds.append(("size", ", ".join(f"{k}={v}" for k, v in odd.items()), odd, False))
        if touches_mask or (observation.dynamic and observation.spec.has_masks):
            kinds.append(("mask", "padded", None, True))
            if observation.dynamic:
                other = observation.spec.sizes(self.baseline.generator, 1)
                kinds.append(("mask", "padded, other sizes", other[0] if other else None, True))
        elif observation.spec.has_constant_flags:
            # The guard lets other values pass.
            kinds[2 if thorough else 1 : 2] = [("mask", "padded", None, True)]
        found = [draw for kind in kinds if (draw := self._drawn(*kind)) is not None]
        found += [mixed] if mixed is not None else []
        if touches_mask:  # what is drawn may not show how masks, and what they mask, hang together
            found += self._examples(2 if thorough else 1)
        if observation.dynamic and not any(draw.rule == "size" for draw in found):
            # Eager refuses sizes that do not fit together.
            for fitting in observation.spec.sizes_in_proportion():
                label = ", ".join(f"{k}={v}" for k, v in fitting.items())
                draw = self._drawn("size", label, fitting, False)
                found += [draw] if draw is not None else []
                if draw is not None and not thorough:
                    break
        self.only_examples = observation.dynamic and not any(draw.rule == "size" for draw in found)
        return found

    def _drawn(
        self, rule: str, label: str, sizes: dict[str, int] | None, padding: bool, *, again: bool = False
    ) -> Draw | None:
        self._seed += 1
        expected = self._expected(sizes, padding, required=label == "like the example" and not again)
        if expected is None and padding and sizes is None and not again:
            return self._drawn("value", "like the example", None, False)
        return None if expected is None else Draw(expected, rule, label, self._seed, sizes, padding)

    def _examples(self, count: int) -> list[Draw]:
        """The last examples as they are."""
        found = []
        for call in self.observation.calls[-count:]:
            self._seed += 1
            expected = self.baseline.expected(call, seed=self._seed)
            found.append(Draw(expected, "mask", "an example as it is", self._seed))
        return found

    def like(self, draw: Draw) -> Draw | None:
        """Another call of the kind of ``draw``; None where eager refuses it."""
        if draw.mixed:
            return self._mixed()
        return self._drawn(draw.rule, draw.label, draw.sizes, draw.padding, again=True)

    def _mixed(self) -> Draw | None:
        """A call with zeros and ones where the examples hold one of them everywhere; None where there is no
        such input, or where eager refused one, for a 1 that is no row of a table, say."""
        if not self._mixes:
            return None
        self._seed += 1
        for keep_integers in (False, True):
            call = self.baseline.draw(mix_integers=True, keep_integers=keep_integers, examples=self._telling)
            try:
                expected = self.baseline.expected(call, seed=self._seed)
            except _STOPS:
                raise
            except Exception:  # noqa: BLE001 - whatever eager says of it: nobody promised to take others
                self.dropped += 1
                continue
            return Draw(expected, "value", "with other flags", self._seed, mixed=True)
        self._mixes = False
        return None

    def _expected(self, sizes: dict[str, int] | None, padding: bool, *, required: bool) -> Expected | None:
        """A fresh call that eager can run. Where resampled integers are refused (placeholders that must
        match in number, say) the example's own are kept; None if eager refuses these too."""
        for keep_integers in (False, True):
            call = self.baseline.draw(
                sizes=sizes, padding=padding, keep_integers=keep_integers, examples=self._telling
            )
            before = self.counts.read()
            try:
                expected = self.baseline.expected(call, seed=self._seed, padded=padding)
            except _STOPS:
                raise
            except Exception:
                self.dropped += 1
                if keep_integers and required:
                    raise
                continue
            self.baseline.keep_integers |= keep_integers
            self.moved.update(self.counts.since(before))
            return expected
        return None
