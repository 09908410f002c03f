"""Find what a model computes: capture, propose, prove, remember."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kpt.error_text import summary
from kpt.ops import index, keys
from kpt.ops.binding import Binding, Hypothesis
from kpt.ops.capture import observe, untouched_randomness
from kpt.ops.captured import Captured, Observation, Seen
from kpt.ops.claims import OutOfTime
from kpt.ops.clone import hooked
from kpt.ops.proof import Outcome, prove
from kpt.ops.sites import Example, Site

if TYPE_CHECKING:
    from kpt.judge.calls import Call

#: By what runs: what the code read from its caller, and how its proof ended.
_PROOFS: dict[Hashable, tuple[tuple[Hashable, Outcome], ...]] = {}
_PROOFS_LIMIT = 4096
#: How the proofs of regions of captured graphs ended, by the region's code and what was asked.
GRAPH_PROOFS: dict[Hashable, Outcome] = {}


@dataclass(frozen=True)
class Recognition:
    """What was proved, and what was proposed but left alone, each with its reason.

    ``unfinished`` counts those among the latter whose proof the deadline ended, or never let begin.
    """

    sites: tuple[Site, ...] = ()
    left_alone: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    proofs: int = 0
    unfinished: int = 0

    def of(self, op: str, kind: str | None = None) -> tuple[Site, ...]:
        """The sites of one op, of one kind if given."""
        return tuple(s for s in self.sites if s.op == op and kind in (None, s.kind))


def forget_proofs() -> None:
    """Empty the memory of proofs."""
    _PROOFS.clear()
    GRAPH_PROOFS.clear()


def recognise(
    model: torch.nn.Module,
    calls: Iterable[Call],
    *,
    registry: Any = None,
    deadline: float | None = None,
    first: Collection[str] = (),
) -> Recognition:
    """Which ops ``model`` computes, and where.

    ``calls`` are example calls (``args`` and ``kwargs``); ``registry`` adds the ops of plugins;
    ``deadline`` is a value of ``time.monotonic()`` after which nothing more is proved; the sites of ops in
    ``first`` are proved before all others. The model is run and tested on copies: its buffers, gradients,
    hooks and all random states stay untouched. A site that holds only in a mode other than the model's
    present one is left alone.
    """
    started = time.monotonic()
    observation = observe(model, calls)
    work = _Work(model, registry, deadline)
    if observation.failure:
        work.left_alone.append(("", observation.failure))
    with untouched_randomness(), torch.inference_mode(False):
        work.consider_all(observation, frozenset(first))
    return Recognition(
        tuple(work.sites),
        tuple(work.left_alone),
        time.monotonic() - started,
        work.proofs,
        work.unfinished,
    )


class _Work:
    def __init__(self, model: torch.nn.Module, registry: Any, deadline: float | None) -> None:
        self.model = model
        self.deadline = deadline
        self.registry = registry
        self.mode = "training" if model.training else "inference"
        self.recognisers = index.recognisers(registry)
        self.sites: list[Site] = []
        self.left_alone: list[tuple[str, str]] = []
        self.memo: dict[int, Any] = {}
        self.proofs = 0
        self.unfinished = 0

    def reference(self, op: str) -> Callable[..., Any]:
        return index.reference(op, self.registry)

    def consider_all(self, observation: Observation, first: frozenset[str]) -> None:
        """Prove what may be an op in ``first`` before all else, and one site of each kind before a second.

        Most sites of one kind are layers of one model and share their proof, so that one of each is what a
        short time is best spent on.
        """
        proposed: list[tuple[Captured, str, list[Hypothesis]]] = []
        for captured in (*observation.modules.values(), *observation.functions.values()):
            kind = "module"
            if captured.function is not None:
                kind = "function" if captured.callee.isidentifier() else "call"
            if captured.calls and (hypotheses := self._hypotheses(captured, kind)):
                proposed.append((captured, kind, hypotheses))
        urgent = {c.path for c, _, hypotheses in proposed if any(h.op in first for h in hypotheses)}
        turns = []
        known: Counter[frozenset[str]] = Counter()
        of_module: dict[str, tuple[bool, int]] = {}
        for captured, kind, hypotheses in proposed:
            alike = frozenset(hypothesis.op for hypothesis in hypotheses)
            turn = (captured.path not in urgent, known[alike])
            known[alike] += 1
            if kind == "module":
                of_module[captured.path] = turn
            turns.append(max(turn, of_module.get(captured.path, turn)))  # a module before what it calls
        whole: set[str] = set()
        found: dict[int, Site] = {}
        for rank in sorted(range(len(proposed)), key=turns.__getitem__):
            captured, kind, hypotheses = proposed[rank]
            if kind != "module" and captured.path in whole:
                continue  # the module as a whole is a site
            site = self.consider(captured, kind, hypotheses)
            if site is not None:
                found[rank] = site
                if kind == "module":
                    whole.add(captured.path)
        self.sites = [found[rank] for rank in sorted(found)]  # as the model ran them, whatever came first

    def consider(self, captured: Captured, kind: str, hypotheses: list[Hypothesis]) -> Site | None:
        """The site of the one of ``hypotheses`` that is proved; else it is left alone, with the reason."""
        name = captured.path + (f":{captured.callee}" if captured.callee else "")
        reason = _unfit(captured, kind)
        if reason is None:
            try:
                outcome = self._outcome(captured, hypotheses)
            except OutOfTime as late:
                self.unfinished += 1
                outcome = Outcome(None, str(late))
            reason = outcome.reason
            if outcome.hypothesis is not None:
                if self.mode in outcome.modes:
                    site = self._site(captured, kind, outcome)
                    return replace(site, others=tuple(self._others(captured, site)))
                reason = f"it is {outcome.hypothesis.op} in evaluation mode only"
        self.left_alone.append((name, reason))
        return None

    def _others(self, captured: Captured, site: Site) -> Iterator[Site]:
        """``site`` for calls that no example shows, where a recogniser knows of some and they are proved."""
        for recogniser in self.recognisers if site.kind != "module" else ():
            find = getattr(recogniser, "unseen", None)
            unseen = find(captured.module, captured) if find is not None else None
            if unseen is None:
                continue
            hypotheses = [h for h in self._hypotheses(unseen, site.kind) if h.op == site.op]
            if not hypotheses:
                continue
            try:
                outcome = self._outcome(unseen, hypotheses)
            except OutOfTime:
                self.unfinished += 1
                continue
            if outcome.hypothesis is not None and self.mode in outcome.modes:
                yield self._site(unseen, site.kind, outcome)

    def _hypotheses(self, captured: Captured, kind: str) -> list[Hypothesis]:
        found: list[Hypothesis] = []
        method = "hypotheses" if kind == "module" else "function_hypotheses"
        for recogniser in self.recognisers:
            propose = getattr(recogniser, method, None)
            if propose is None:
                continue
            try:
                found.extend(propose(captured.module, captured))
            except Exception as error:  # noqa: BLE001 - a stranger's recogniser loses only its own
                where = f"{captured.path}{':' + captured.callee if captured.callee else ''}"
                what = f"the recogniser {type(recogniser).__name__} raised {summary(error)}"
                self.left_alone.append((where, what))
        return found

    def _outcome(self, captured: Captured, hypotheses: list[Hypothesis]) -> Outcome:
        key: Hashable = (
            keys.proof_key(captured, self.memo),
            tuple(h.claim for h in hypotheses),
        )
        try:
            entries = _PROOFS.get(key, ())
        except TypeError:  # an attribute without a hash: proved each time
            key, entries = None, ()
        for found, outcome in entries:
            if found == keys.reads_key(captured.module, outcome.reads, self.memo):
                return outcome
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime("the time for recognition was over")
        self.proofs += 1
        outcome = prove(captured, hypotheses, self.reference, self.deadline)
        if outcome.hypothesis is None and _may_be_too_small(captured):
            full = prove(captured, hypotheses, self.reference, self.deadline, shrink=False)
            outcome = full if full.hypothesis is not None else outcome
        if key is not None:
            if len(_PROOFS) >= _PROOFS_LIMIT:
                _PROOFS.clear()
            found = keys.reads_key(captured.module, outcome.reads, self.memo)
            _PROOFS[key] = (*entries, (found, outcome))
        return outcome

    def _site(self, captured: Captured, kind: str, outcome: Outcome) -> Site:
        assert outcome.hypothesis is not None
        guards = {
            name: value
            for name, value in vars(captured.module).items()
            if type(value) in (int, float, str, bool) and name != "training" and not name.startswith("_")
        }
        binding = Binding(outcome.hypothesis, captured.signature, outcome.constants, guards)
        examples = _examples(captured)
        return Site(
            op=outcome.hypothesis.op,
            path=captured.path,
            kind=kind,
            module=captured.module,
            binding=binding,
            examples=examples,
            devices=tuple(dict.fromkeys(example.device for example in examples)),
            modes=outcome.modes,
            dtypes=outcome.dtypes,
            callee=captured.callee,
            attribute=captured.attribute,
            original=captured.function,
        )


def _may_be_too_small(captured: Captured) -> bool:
    """Whether a shrunk copy may have failed where the full one would not, and the latter is affordable."""
    elements = sum(p.numel() for p in captured.module.parameters())
    return captured.function is None and 1 << 18 < elements <= 1 << 22


def _unfit(captured: Captured, kind: str) -> str | None:
    """Why a site cannot be tested or replaced at all, or None."""
    module = captured.module
    if kind == "module":
        problem = hooked(module)
        if problem:
            return problem
    elif "forward" in module.__dict__:
        return "its caller has a forward set on the instance"
    for path, value in (*module.named_parameters(), *module.named_buffers()):
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"{path} is a {type(value).__name__}, not a plain tensor"
        if value.device.type == "meta":
            return f"{path} is on the meta device"
    if kind == "module":
        for call in captured.calls:
            for name, value in call.items():
                if not isinstance(
                    value, (Seen, bool, int, float, str, type(None), torch.dtype)
                ) and value not in ((), {}):
                    return f"its argument {name} is a {type(value).__name__}"
    return None


def _examples(captured: Captured) -> tuple[Example, ...]:
    found = []
    for call in captured.calls:
        seen = {name: value for name, value in call.items() if isinstance(value, Seen)}
        device = next((str(value.device) for value in seen.values()), "cpu")
        found.append(
            Example(
                {name: str(value.dtype).removeprefix("torch.") for name, value in seen.items()},
                {name: value.shape for name, value in seen.items()},
                {name: value.stride for name, value in seen.items()},
                device,
                _plain(call),
                tuple(name for name, value in call.items() if isinstance(value, torch.nn.Module)),
            )
        )
    return tuple(found)


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are numbers, strings, flags or None; those of ``**kwargs`` by their own names."""
    found: dict[str, Any] = {}
    for name, value in call.items():
        for key, item in value.items() if type(value) is dict else ((name, value),):
            if isinstance(item, (bool, int, float, str, type(None))):
                found[str(key)] = item
    return found
