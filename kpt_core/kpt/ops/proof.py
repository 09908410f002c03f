"""Prove that a site computes an op, by running its own code against the reference.

On a copy with randomised parameters, with low float dtypes promoted to fp64 inside, at several input
scales and lengths, in every mode, values and gradients. Exactly one hypothesis has to survive, and
its output has to depend on the input. Then the code runs in each native dtype, under autocast, with
and without gradients: the torch calls it makes must be the same, because a branch that fp64 never
takes is one that fp64 cannot prove.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from kpt.ops.captured import Captured
from kpt.ops.comparison import difference, gradients_of, tensors, versions_of
from kpt.ops.examples import Examples
from kpt.ops.promote import Promoted, Refused, Trace
from kpt.ops.scan import executed
from kpt.ops.sites import Binding, Hypothesis

#: Relative to the largest value. fp64 noise is 1e-12 here; eps = 1e-6 instead of 1e-5 is 5e-6.
_TOLERANCE = 1e-9
#: Gradients go through longer sums.
_GRADIENT_TOLERANCE = 1e-7
_NATIVE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}
_SCALES = (1e3, 1e-3, 1e6)


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


class Unproved(Exception):
    """Ends a proof; the message is the reason."""


class OutOfTime(Unproved):
    """The deadline passed."""


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
    proof = None
    try:
        proof = _Proof(captured, hypotheses, reference, deadline, shrink, straight)
        return proof.outcome()
    except OutOfTime:
        raise
    except (Refused, Unproved) as failure:
        reason = str(failure)
    except Exception as error:  # noqa: BLE001 - strangers' code may raise anything; it stays unproved
        reason = f"its proof raised {type(error).__name__}: {_short(error)}"
    return Outcome(None, reason, reads=frozenset(proof.reads) if proof else frozenset())


class _Proof:
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
            (hypothesis, Binding(hypothesis, captured.signature, self.examples.constants(hypothesis)))
            for hypothesis in hypotheses
        ]
        self.reads: set[str] = set()
        #: Variations that the site's own code does not run with, so that nothing is claimed for them
        self.refused: list[str] = []

    # ---- running ------------------------------------------------------------------------------

    def _clock(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime("the time for recognition was over")

    def _call(self, twin: torch.nn.Module, bound: dict[str, Any]) -> Any:
        arguments = inspect.BoundArguments(self.captured.signature, dict(bound))  # type: ignore[arg-type]
        if self.captured.function is None:
            return twin.forward(*arguments.args, **arguments.kwargs)
        if not any(value is twin for value in bound.values()):
            return self.captured.function(*arguments.args, **arguments.kwargs)
        with _recorded(twin, self.reads):
            return self.captured.function(*arguments.args, **arguments.kwargs)

    def _claim(self, twin: torch.nn.Module, bound: dict[str, Any], binding: Binding) -> Any:
        arguments = inspect.BoundArguments(self.captured.signature, dict(bound))  # type: ignore[arg-type]
        # references keep float64 as it is; only a binding that casts needs to be promoted, which is slow
        casts = any(".float()" in text or ".to(" in text for text in binding.arguments.values())
        wide = any(value.dtype == torch.float64 for value in tensors(bound))
        with Promoted() if casts and wide else nullcontext():
            return binding.run(twin, self.reference(binding.op), *arguments.args, **arguments.kwargs)

    def _filter(self, twin: torch.nn.Module, bound: dict[str, Any], what: str) -> Any:
        """Run the site on ``bound`` in fp64 and drop the hypotheses that disagree."""
        self._clock()
        versions = versions_of(twin, bound)
        with Promoted():
            out = self._call(twin, bound)
        if versions != versions_of(twin, bound):
            raise Unproved("it writes to its inputs, parameters or buffers")
        survivors = []
        nearest, nearest_error = "", float("inf")
        for hypothesis, binding in self.candidates:
            try:
                claimed = self._claim(twin, bound, binding)
                error = difference(out, claimed)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as failure:
                if isinstance(failure, Unproved):
                    raise
                error = float("inf")
            if error <= _TOLERANCE:
                survivors.append((hypothesis, binding))
            elif error < nearest_error:
                nearest, nearest_error = hypothesis.describe(), error
        if not survivors:
            closest = f"; nearest was {nearest}, off by {nearest_error:.1e}" if nearest else ""
            raise Unproved(f"it computes something else {what}{closest}")
        self.candidates = survivors
        return out

    # ---- the proof ----------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        if not self.candidates:
            return Outcome(None, "no hypothesis")
        examples = self.examples
        twin = examples.twin(torch.float64)
        twin.eval()
        with torch.no_grad(), torch.autocast(examples.device.type, enabled=False):
            base = examples.draw(0, twin)
            try:
                with Promoted():
                    watch, _ = executed(lambda: self._call(twin, base))
            except Refused:
                raise
            except Exception as error:
                raise Unproved(f"its copy raised {type(error).__name__}: {_short(error)}") from error
            if watch.complaint:
                raise Unproved(watch.complaint)
            first = self._filter(twin, base, "on random inputs")
            self._nondegenerate(first)
            self._integers(twin, watch.all_integers)
            self._values(twin, watch.integers)
            again = self._filter(twin, base, "when called again")
            if difference(first, again) > 0.0:
                raise Unproved("it returns something else when called again")
        if len(self.candidates) > 1:
            self._by_dtype()
        if len(self.candidates) > 1:
            self._most_restricted()
        if len(self.candidates) > 1:
            names = " and ".join(hypothesis.describe() for hypothesis, _ in self.candidates[:3])
            raise Unproved(f"several hypotheses agree with it: {names}")
        modes = self._modes(twin)
        dtypes = self._native(twin)
        hypothesis, binding = self.candidates[0]
        return Outcome(hypothesis, "", modes, dtypes, dict(binding.constants), frozenset(self.reads))

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
        examples = self.examples
        scales = dict.fromkeys((*_SCALES, *(s for h, _ in self.candidates for s in h.scales)))
        for scale in scales:
            self._filter(twin, examples.draw(0, twin, scale=scale), f"on inputs of magnitude {scale:g}")
        for index in range(1, len(self.captured.calls)):
            self._filter(twin, examples.draw(index, twin), "on another of the shapes it was called with")
        if self.straight:
            return
        strided = [("on inputs that are not contiguous", examples.draw(0, twin, strided=True))]
        others = examples.other_values(twin, self.candidates)
        for what, bound in (*others, *strided, *examples.variations(twin, integers)):
            try:
                with Promoted():
                    self._call(twin, bound)
            except Refused:
                raise
            except Exception as error:  # noqa: BLE001 - a call that the code itself refuses
                self.refused.append(f"{what}: {type(error).__name__}")
                continue
            self._filter(twin, bound, what)

    def _integers(self, twin: torch.nn.Module, literals: tuple[int, ...]) -> None:
        """Integers that the examples did not hold: one class may be ignored or treated apart."""
        wanted = {name: limits for h, _ in self.candidates for name, limits in h.integers.items()}
        for name, (low, high) in wanted.items():
            for values in self.examples.integer_draws(name, low, high, literals):
                bound = self.examples.draw(0, twin)
                bound[name] = values
                try:
                    with Promoted():
                        self._call(twin, bound)
                except Refused:
                    raise
                except Exception as error:  # noqa: BLE001 - values that the code itself refuses
                    self.refused.append(f"integers in {name}: {type(error).__name__}")
                    continue
                self._filter(twin, bound, f"with other integers in {name}")

    def _most_restricted(self) -> None:
        """Of hypotheses that differ only in arguments they read or pin, keep the one that pins most.

        A flag that the site accepts with one value only (a causal flag beside a mask) cannot tell
        them apart; pinned, it is a condition of each call, and within that all are the same.
        """
        pins = [len(binding.constants) for _, binding in self.candidates]
        if pins.count(max(pins)) == 1 and len({hypothesis.op for hypothesis, _ in self.candidates}) == 1:
            self.candidates = [self.candidates[pins.index(max(pins))]]

    def _by_dtype(self) -> None:
        """Of hypotheses that differ by a cast only, keep those that return the site's own dtype."""
        twin = self.examples.twin(torch.bfloat16)
        twin.eval()
        bound = self.examples.draw(0, twin, dtype=torch.bfloat16)
        with torch.no_grad():
            given = [t.dtype for t in tensors(self._call(twin, bound))]
            self.candidates = [
                (hypothesis, binding)
                for hypothesis, binding in self.candidates
                if [t.dtype for t in tensors(self._claim(twin, bound, binding))] == given
            ] or self.candidates

    def _modes(self, twin: torch.nn.Module) -> tuple[str, ...]:
        self._gradients(twin, "in evaluation mode")
        twin.train()
        try:
            with torch.no_grad():
                self._filter(twin, self.examples.draw(0, twin), "in training mode")
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
        self._clock()
        binding = self.candidates[0][1]
        inputs = self.examples.draw(0, twin)
        names = [name for name, value in inputs.items() if any(t.is_floating_point() for t in tensors(value))]
        weights = [p for p in twin.parameters() if p.requires_grad and p.numel() < 1 << 22]
        # some inputs have no gradient (class weights of a loss): then each of the others is tried alone
        for wanted in (names, *([name] for name in names if len(names) > 1)):
            leaves = [t for n in wanted for t in tensors(inputs[n]) if t.is_floating_point()]
            for leaf in leaves:
                leaf.requires_grad_()
            try:
                with torch.enable_grad(), Promoted():
                    grads = gradients_of(self._call(twin, inputs), [*leaves, *weights])
            except RuntimeError as error:
                for leaf in leaves:
                    leaf.requires_grad_(False)
                if wanted is names and len(names) == 1:
                    raise Unproved(f"it has no gradient {where}: {_short(error)}") from error
                continue
            with torch.enable_grad():
                claimed = gradients_of(self._claim(twin, inputs, binding), [*leaves, *weights])
            self._same_gradients(grads, claimed, where)
            for leaf in leaves:
                leaf.requires_grad_(False)
            if wanted is names:
                return

    def _same_gradients(
        self, grads: list[torch.Tensor | None], claimed: list[torch.Tensor | None], where: str
    ) -> None:
        op = self.candidates[0][0].op
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

    def _native(self, twin: torch.nn.Module) -> tuple[str, ...]:
        """The dtypes in which the site makes the same calls and returns the same dtype as the op."""
        binding = self.candidates[0][1]
        held: list[str] = []
        baseline: list[str] | None = None
        examples = self.examples
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            self._clock()
            twin.to(dtype)
            bound = examples.draw(0, twin, dtype=dtype)
            try:
                with torch.no_grad():
                    out, trace = _traced(lambda b=bound: self._call(twin, b))  # type: ignore[misc]
            except RuntimeError:
                continue  # no kernel for this dtype on this device
            if baseline is None:
                baseline = trace
                if not self.straight:
                    self._branches(twin, bound, baseline)
            elif trace != baseline and not self.straight:
                raise Unproved(f"it takes another branch in {_name(dtype)}")
            with torch.no_grad():
                claimed = self._claim(twin, bound, binding)
            if [t.dtype for t in tensors(out)] != [t.dtype for t in tensors(claimed)]:
                continue
            if difference(out, claimed) > _NATIVE_TOLERANCE[dtype]:
                raise Unproved(f"it computes something else in {_name(dtype)}")
            held.append(_name(dtype))
        if not held:
            raise Unproved("it returns another dtype than the op does")
        if examples.mixed:
            twin = examples.twin(None)
            twin.eval()
            bound = examples.draw(0, twin, dtype=None)
            with torch.no_grad():
                out, claimed = self._call(twin, bound), self._claim(twin, bound, binding)
            dtypes = [[_name(t.dtype) for t in tensors(value)] for value in (out, claimed)]
            if dtypes[0] != dtypes[1]:
                given = " and ".join(dtypes[0])
                raise Unproved(f"it returns {given} where {binding.op} gives {' and '.join(dtypes[1])}")
        return tuple(held)

    def _branches(self, twin: torch.nn.Module, bound: dict[str, Any], baseline: list[str]) -> None:
        device = self.examples.device.type
        settings: list[tuple[str, Any]] = [
            ("with gradients enabled", torch.enable_grad()),
            ("in inference mode", torch.inference_mode()),
            ("under autocast", _autocast(device)),
        ]
        for what, setting in settings:
            try:
                with setting:
                    _, trace = _traced(lambda: self._call(twin, bound))
            except RuntimeError as error:
                raise Unproved(f"it fails {what}: {_short(error)}") from error
            if trace != baseline:
                raise Unproved(f"it takes another branch {what}")


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


class _autocast:
    """Autocast without gradients, on devices that have it."""

    def __init__(self, device: str) -> None:
        known = torch.amp.autocast_mode.is_autocast_available(device)
        self.inner: Any = torch.autocast(device, torch.bfloat16) if known else nullcontext()
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.inner.__exit__(*exc)
        self.no_grad.__exit__(*exc)


def _traced(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    with Trace() as trace:
        out = function()
    return out, trace.names


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else ""
