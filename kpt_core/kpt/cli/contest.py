"""One interleaved run of several contenders on the same fresh inputs."""

from __future__ import annotations

import copy
import inspect
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kpt.cli.output import usage
from kpt.cli.sources import model_fails
from kpt.plugins import instantiate
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line

if TYPE_CHECKING:
    import torch

    from kpt.judge.calls import Call
    from kpt.judge.kinds import Kind
    from kpt.plugins import Registered, Registry
    from kpt.specs import ContenderSpec

#: A timed span is at least this long, so that the timer and the loop do not count.
SPAN_SECONDS = 5e-3
MAX_REPEATS = 1000
#: Names of contenders that are always there.
OWN = ("eager", "kpt")

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], Any]


@dataclass
class Entrant:
    """One contender: how it is prepared, and what came of it.

    ``error`` is the root mean square of its difference from eager's outputs, relative to theirs;
    None where the outputs cannot be compared. ``spans`` are seconds per call, kind by kind. ``ratio`` is
    eager's time over its own, the median of the paired ratios with its 95 % interval; of several kinds of
    calls it is the geometric mean of their medians, weighed with their shares, and
    ``seconds`` the arithmetic mean. ``note`` is what its preparation has to say.
    """

    name: str
    prepare: Callable[[torch.nn.Module, Inputs], Run]
    level: str = "exact"
    absent: str = ""
    failed: str = ""
    note: str = ""
    setup_seconds: float = 0.0
    run: Run | None = None
    spans: list[list[float]] = field(default_factory=list)
    kinds: tuple[Kind, ...] = ()
    error: float | None = None
    compared: bool = False
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(kind.share for kind in self.kinds)

    @property
    def seconds(self) -> float:
        from kpt.judge.intervals import average

        return average(self.spans, self.shares) if any(self.spans) else math.nan

    def to_dict(self) -> dict[str, Any]:
        state = "absent" if self.absent else "failed" if self.failed else "ran"
        return {
            "name": self.name,
            "level": self.level,
            "state": state,
            "reason": self.absent or self.failed,
            "note": self.note,
            "setup_seconds": self.setup_seconds,
            "seconds": self.seconds,
            "ratio": self.ratio,
            "ratio_low": self.low,
            "ratio_high": self.high,
            "error": self.error,
            "spans": sum(map(len, self.spans)),
            "kinds": [
                {"label": kind.label, "share": kind.share, "seconds": statistics.median(spans)}
                for kind, spans in zip(self.kinds, self.spans, strict=True)
                if len(self.kinds) > 1 and spans
            ],
        }


def installed(registry: Registry) -> list[Entrant]:
    """The contenders that plugins offer; those whose packages are missing are marked as absent."""
    return [_entrant(registered) for registered in registry.specs("kpt_contenders")]


def _entrant(registered: Registered[ContenderSpec]) -> Entrant:
    spec = registered.spec
    missing = [name for name in spec.requires if attempt(find_spec, name).value is None]

    def prepare(model: torch.nn.Module, example: Inputs) -> Run:
        run: Run = instantiate(spec.entry).prepare(model, example)
        return run

    absent = f"needs {', '.join(missing)}" if missing else ""
    if spec.name in OWN:
        absent = f"{registered.owner} calls it as kpt bench calls its own; it needs another name"
    return Entrant(spec.name, prepare, spec.level, absent=absent)


def eager() -> Entrant:
    """The untouched model, which everybody is compared with."""
    return Entrant("eager", lambda model, example: lambda inputs: _call(model, inputs))


def ours(examples: Any, **options: Any) -> Entrant:
    """`kpt.optimize` on the same examples."""

    def prepare(model: torch.nn.Module, example: Inputs) -> Run:
        import kpt

        optimized = kpt.optimize(model, examples, **options)
        entrant.note = kpt.report(optimized).headline()
        return lambda inputs: _call(optimized, inputs)

    entrant = Entrant("kpt", prepare, str(options.get("level", "production")))
    return entrant


def _call(model: torch.nn.Module, inputs: Inputs) -> Any:
    return model(**inputs)


def by_name(model: torch.nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of ``call`` by the names of the model's forward."""
    signature = inspect.signature(model.forward)
    bound: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(value)
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise usage(
                f"The argument {name!r} of the forward has no name that contenders could use.",
                "Give the model a forward with named parameters.",
            )
        else:
            bound[name] = value
    return bound


def contest(
    model: torch.nn.Module,
    entrants: Sequence[Entrant],
    calls: Callable[[], Call] | Sequence[Kind],
    *,
    seconds: float,
    rounds: int = 200,
    tell: Callable[[str], None],
) -> None:
    """Prepare every entrant on its own copy of ``model``, then time all of them in one loop.

    Each round draws fresh inputs of one of the kinds of ``calls``, which take turns, and calls the entrants
    in random order, so that drift and noise hit all of them alike. ``seconds`` bounds the timing, not the
    preparation.
    """
    import torch

    from kpt.judge.clock import synchroniser
    from kpt.judge.intervals import LEAST_OF_A_KIND
    from kpt.judge.kinds import one_kind

    wait = synchroniser()
    reference = entrants[0]
    kinds = one_kind(calls) if callable(calls) else tuple(calls)
    with torch.no_grad():
        examples = [kind.next_call() for kind in sorted(kinds, key=lambda kind: -kind.share)]
        _prepare(reference, model, examples, wait)
        if reference.run is None:
            raise model_fails(reference.failed)
        for entrant in entrants[1:]:
            if not entrant.absent:
                tell(f"preparing {entrant.name}")
                _prepare(entrant, model, examples, wait)
        prepared = [entrant for entrant in entrants if entrant.run is not None]
        for each in kinds:
            _compare(
                [entrant for entrant in prepared if entrant.run is not None],
                by_name(model, each.next_call().clone()),
            )
            if reference.run is None:
                raise model_fails(reference.failed)
        running = [entrant for entrant in prepared if entrant.run is not None]
        tell(f"timing {', '.join(entrant.name for entrant in running)}")
        for entrant in running:
            entrant.spans, entrant.kinds = [[] for _ in kinds], kinds
        repeats = [_repeats(reference.run, by_name(model, kind.next_call().clone()), wait) for kind in kinds]
        least = max(5, LEAST_OF_A_KIND * len(kinds))
        order = random.Random(0)
        end = time.perf_counter() + seconds
        for number in range(rounds):
            if number >= least and time.perf_counter() >= end:
                break
            kind = number % len(kinds)
            drawn = [kinds[kind].next_call() for _ in range(repeats[kind])]
            for entrant in order.sample(running, len(running)):
                inputs = [by_name(model, call.clone()) for call in drawn]
                outcome = attempt(_time, entrant, kind, inputs, wait)
                if outcome.error is not None:
                    entrant.failed, entrant.run = f"while it was timed: {one_line(outcome.error)}", None
                    running.remove(entrant)
                    if entrant is reference:
                        raise model_fails(entrant.failed) from outcome.error
    for entrant in running:
        _rate(entrant, reference)


def _prepare(
    entrant: Entrant, model: torch.nn.Module, calls: Sequence[Call], wait: Callable[[], None]
) -> None:
    """Let ``entrant`` prepare itself for the first of ``calls``, and run all of them, on copies.

    torch's flags are put back for the others.
    """
    from kpt.judge.state import untouched

    start = time.perf_counter()
    example, *others = [by_name(model, call.clone()) for call in calls]

    def prepared() -> Run:
        run = entrant.prepare(copy.deepcopy(model), example)
        for inputs in (example, *others):  # a first call compiles, and belongs to the preparation
            run(inputs)
        wait()
        return run

    with untouched():
        outcome = attempt(prepared)
    entrant.setup_seconds = time.perf_counter() - start
    if outcome.error is not None:
        entrant.failed = one_line(outcome.error)
    else:
        entrant.run = outcome.value


def _compare(running: Sequence[Entrant], inputs: Inputs) -> None:
    """Give each its error from the first, which is eager, or keep a larger one of inputs compared before.

    Every one gets inputs of its own. Where one of the errors can't be told there is none.
    """
    outputs: dict[str, list[Any]] = {}
    for entrant in running:
        assert entrant.run is not None
        outcome = attempt(entrant.run, copy.deepcopy(dict(inputs)))
        if outcome.error is not None:
            entrant.failed, entrant.run = f"on fresh inputs: {one_line(outcome.error)}", None
        else:
            outputs[entrant.name] = list(_tensors(outcome.value))
    expected = outputs.get(running[0].name)
    for entrant in running:
        if entrant.name in outputs and expected is not None:
            error = _relative_error(outputs[entrant.name], expected)
            before = entrant.error if entrant.compared else 0.0
            entrant.error = None if error is None or before is None else max(error, before)
            entrant.compared = True


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of an output, in order; other libraries' arrays become tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value.detach().double().cpu()
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif hasattr(value, "__array__"):
        yield from _tensors(torch.as_tensor(value))


def _relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    pairs = list(zip(found, expected, strict=False))
    if not pairs or any(one.shape != other.shape for one, other in pairs):
        return None
    return max(
        float((one - other).square().mean().sqrt() / other.square().mean().sqrt().clamp_min(1e-30))
        for one, other in pairs
    )


def _repeats(run: Run, inputs: Inputs, wait: Callable[[], None]) -> int:
    start = time.perf_counter()
    run(inputs)
    wait()
    spent = max(time.perf_counter() - start, 1e-7)
    return min(MAX_REPEATS, math.ceil(SPAN_SECONDS / spent))


def _time(entrant: Entrant, kind: int, calls: Sequence[Inputs], wait: Callable[[], None]) -> None:
    run = entrant.run
    assert run is not None
    wait()
    start = time.perf_counter()
    for inputs in calls:
        run(inputs)
    wait()
    entrant.spans[kind].append((time.perf_counter() - start) / len(calls))


def _rate(entrant: Entrant, reference: Entrant) -> None:
    from kpt.judge.intervals import middle, stratified_interval

    ratios = [
        [theirs / own for theirs, own in zip(*spans, strict=True)]
        for spans in zip(reference.spans, entrant.spans, strict=True)
    ]
    entrant.ratio = middle(ratios, entrant.shares)
    entrant.low, entrant.high = stratified_interval(ratios, entrant.shares)
