"""Prove that a site computes an op, by running its own code against the reference.

On a copy with randomised parameters, with low float dtypes promoted to fp64 inside, at several input
scales and lengths, in every mode, values and gradients. Exactly one hypothesis has to survive, and
its output has to depend on the input. Then the code runs in each native dtype, under autocast, with
and without gradients: the torch calls it makes must be the same, because a branch that fp64 never
takes is one that fp64 cannot prove.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kpt.ops.binding import Hypothesis
from kpt.ops.captured import Captured
from kpt.ops.claims import Claims, OutOfTime, Unproved, short
from kpt.ops.comparison import difference, gradients_of, tensors
from kpt.ops.native import native_dtypes
from kpt.ops.promote import Promoted, Refused
from kpt.ops.scan import executed

#: Gradients go through longer sums.
_GRADIENT_TOLERANCE = 1e-7
_SCALES = (1e3, 1e-3, 1e6)

_log = logging.getLogger("kpt")


@dataclass(frozen=True)
class Outcome:
    """What a proof ended with. ``hypothesis`` is None when nothing was proved; ``reason`` tells why."""

    hypothesis: Hypothesis | None
    reason: str = ""
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    #: For a function: the attributes of the calling module that were read
    reads: frozenset[str] = frozenset()


def prove(
    captured: Captured,
    hypotheses: Sequence[Hypothesis],
    reference: Callable[[str], Callable[..., Any]],
    deadline: float | None = None,
    shrink: bool = True,
    straight: bool = False,
) -> Outcome:
    """Test ``hypotheses`` about one site; ``reference(op)`` gives an op's reference.

    ``straight`` says that the code has no branches and belongs to one shape, as captured graphs do.
    ``deadline`` is a value of ``time.monotonic()``; `OutOfTime` is raised when it passes.
    """
    claims = None
    try:
        claims = Claims(captured, hypotheses, reference, deadline, shrink, straight)
        return _Proof(claims).outcome()
    except OutOfTime:
        raise
    except (Refused, Unproved) as failure:
        reason = str(failure)
    except Exception as error:  # noqa: BLE001 - strangers' code may raise anything; it stays unproved
        reason = f"its proof raised {type(error).__name__}: {short(error)}"
    return Outcome(None, reason, reads=frozenset(claims.reads) if claims else frozenset())


class _Proof:
    """The steps of one proof, in their order."""

    def __init__(self, claims: Claims) -> None:
        self.claims = claims

    def outcome(self) -> Outcome:
        claims = self.claims
        if not claims.candidates:
            return Outcome(None, "no hypothesis")
        examples = claims.examples
        twin = examples.twin(torch.float64)
        twin.eval()
        with torch.no_grad(), torch.autocast(examples.device.type, enabled=False):
            base = examples.draw(0, twin)
            try:
                with Promoted():
                    watch, _ = executed(lambda: claims.call(twin, base))
            except Refused:
                raise
            except Exception as error:
                raise Unproved(f"its copy raised {type(error).__name__}: {short(error)}") from error
            if watch.complaint:
                raise Unproved(watch.complaint)
            first = claims.filter(twin, base, "on random inputs")
            self._nondegenerate(first)
            self._integers(twin, watch.all_integers)
            self._values(twin, watch.integers)
            again = claims.filter(twin, base, "when called again")
            if difference(first, again) > 0.0:
                raise Unproved("it returns something else when called again")
        if len(claims.candidates) > 1:
            self._by_dtype()
        if len(claims.candidates) > 1:
            self._most_restricted()
        if len(claims.candidates) > 1:
            names = " and ".join(hypothesis.describe() for hypothesis, _ in claims.candidates[:3])
            raise Unproved(f"several hypotheses agree with it: {names}")
        modes = self._modes(twin)
        dtypes = native_dtypes(claims, twin)
        hypothesis, binding = claims.candidates[0]
        return Outcome(hypothesis, "", modes, dtypes, dict(binding.constants), frozenset(claims.reads))

    def _nondegenerate(self, out: Any) -> None:
        for tensor in tensors(out):
            if tensor.numel() > 1:
                spread = tensor.double().std()
                if (
                    not bool(torch.isfinite(spread))
                    or float(spread) <= 1e-6 * float(tensor.abs().max()) + 1e-300
                ):
                    raise Unproved("its output on random inputs is constant, and agrees with anything")

    def _values(self, twin: torch.nn.Module, integers: tuple[int, ...]) -> None:
        claims, examples = self.claims, self.claims.examples
        scales = dict.fromkeys((*_SCALES, *(s for h, _ in claims.candidates for s in h.scales)))
        for scale in scales:
            claims.filter(twin, examples.draw(0, twin, scale=scale), f"on inputs of magnitude {scale:g}")
        for index in range(1, len(claims.captured.calls)):
            claims.filter(twin, examples.draw(index, twin), "on another of the shapes it was called with")
        if claims.straight:
            return
        strided = [("on inputs that are not contiguous", examples.draw(0, twin, strided=True))]
        others = examples.other_values(twin, claims.candidates)
        for what, bound in (*others, *strided, *examples.variations(twin, integers)):
            try:
                with Promoted():
                    claims.call(twin, bound)
            except Refused:
                raise
            except Exception as error:  # noqa: BLE001 - the code itself refuses it: nothing is claimed for it
                _log.debug("%s refuses a call %s: %s", claims.captured.path, what, short(error))
                continue
            claims.filter(twin, bound, what)

    def _integers(self, twin: torch.nn.Module, literals: tuple[int, ...]) -> None:
        """Integers that the examples did not hold: one class may be ignored or treated apart."""
        claims = self.claims
        wanted = {name: limits for h, _ in claims.candidates for name, limits in h.integers.items()}
        for name, (low, high) in wanted.items():
            high = claims.examples.within(high)
            for values in claims.examples.integer_draws(name, low, high, literals):
                bound = claims.examples.draw(0, twin)
                bound[name] = values
                try:
                    with Promoted():
                        claims.call(twin, bound)
                except Refused:
                    raise
                except Exception as error:  # noqa: BLE001 - values that the code itself refuses
                    _log.debug("%s refuses integers in %s: %s", claims.captured.path, name, short(error))
                    continue
                claims.filter(twin, bound, f"with other integers in {name}")

    def _most_restricted(self) -> None:
        """Of hypotheses that differ only in arguments they read or pin, keep the one that pins most.

        A flag that the site accepts with one value only (a causal flag beside a mask) cannot tell
        them apart; pinned, it is a condition of each call, and within that all are the same.
        """
        claims = self.claims
        pins = [len(binding.constants) for _, binding in claims.candidates]
        if pins.count(max(pins)) == 1 and len({hypothesis.op for hypothesis, _ in claims.candidates}) == 1:
            claims.candidates = [claims.candidates[pins.index(max(pins))]]

    def _by_dtype(self) -> None:
        """Of hypotheses that differ by a cast only, keep those that return the site's own dtype."""
        claims = self.claims
        twin = claims.examples.twin(torch.bfloat16)
        twin.eval()
        bound = claims.examples.draw(0, twin, dtype=torch.bfloat16)
        with torch.no_grad():
            given = [t.dtype for t in tensors(claims.call(twin, bound))]
            claims.candidates = [
                (hypothesis, binding)
                for hypothesis, binding in claims.candidates
                if [t.dtype for t in tensors(claims.claim(twin, bound, binding))] == given
            ] or claims.candidates

    def _modes(self, twin: torch.nn.Module) -> tuple[str, ...]:
        claims = self.claims
        self._gradients(twin, "in evaluation mode")
        twin.train()
        try:
            with torch.no_grad():
                claims.filter(twin, claims.examples.draw(0, twin), "in training mode")
            self._gradients(twin, "in training mode")
        except Refused:
            return ("inference",)  # dropout and other randomness in training
        except Unproved as failure:
            if "writes to its" in str(failure) or "gradient" in str(failure):
                raise
            return ("inference",)
        finally:
            twin.eval()
        return ("inference", "training")

    def _gradients(self, twin: torch.nn.Module, where: str) -> None:
        claims = self.claims
        claims.check_time()
        binding = claims.first
        inputs = claims.examples.draw(0, twin)
        names = [name for name, value in inputs.items() if any(t.is_floating_point() for t in tensors(value))]
        weights = [p for p in twin.parameters() if p.requires_grad and p.numel() < 1 << 22]
        # some inputs have no gradient (class weights of a loss): then each of the others is tried alone
        for wanted in (names, *([name] for name in names if len(names) > 1)):
            leaves = [t for n in wanted for t in tensors(inputs[n]) if t.is_floating_point()]
            for leaf in leaves:
                leaf.requires_grad_()
            try:
                with torch.enable_grad(), Promoted():
                    grads = gradients_of(claims.call(twin, inputs), [*leaves, *weights])
            except RuntimeError as error:
                for leaf in leaves:
                    leaf.requires_grad_(False)
                if wanted is names and len(names) == 1:
                    raise Unproved(f"it has no gradient {where}: {short(error)}") from error
                continue
            with torch.enable_grad():
                claimed = gradients_of(claims.claim(twin, inputs, binding), [*leaves, *weights])
            self._same_gradients(grads, claimed, where)
            for leaf in leaves:
                leaf.requires_grad_(False)
            if wanted is names:
                return

    def _same_gradients(
        self, grads: list[torch.Tensor | None], claimed: list[torch.Tensor | None], where: str
    ) -> None:
        op = self.claims.candidates[0][0].op
        for one, other in zip(grads, claimed, strict=True):
            if one is None and other is None:
                continue
            if one is None or other is None:
                given = one if other is None else other
                if given is not None and bool((given != 0).any()):
                    raise Unproved(f"its gradient differs from that of {op} {where}: one is missing")
            elif difference(one, other) > _GRADIENT_TOLERANCE:
                raise Unproved(
                    f"its gradient differs from that of {op} {where}, by {difference(one, other):.1e}"
                )
