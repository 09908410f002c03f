"""Kernels are judged alone before a plan may hold them, on inputs that a model run need not show:
odd sizes, strided and misaligned tensors, poisoned outputs, two calls in a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kpt import compiling
from kpt.error_text import summary
from kpt.judge.kernels import inputs_like, is_weight, judge_kernel
from kpt.judge.verdict import Verdict, passed, rejected
from kpt.kernels import callable_for, kind_of
from kpt.transaction.budget import BudgetSpent

if TYPE_CHECKING:
    from kpt.ops.sites import Site
    from kpt.transaction.plan import Candidate
    from kpt.transaction.trial import Trials

#: Sites of one kernel that differ in what they saw are judged apart: this many in any case, those that serve
#: most sites first,
_LEAST_KINDS = 3
#: and all others while this share of the budget lasts. What was not judged by then is not served.
_SHARE = 0.05
#: The last of them may take that many times what the slowest before it took.
_PATIENCE = 2.0
#: Elements of a weight above which the judge takes the model's own.
_LARGE = 1 << 20
#: Elements of the activations and weights together above which scales and layouts are tried on fewer rows:
#: their references in fp64 would take longer than the kernel will ever save here.
_MANY = 1 << 18
_FEW_ROWS = 61


def judge(candidate: Candidate, trials: Trials) -> Verdict:
    """Judge a kernel candidate on one site of each kind that it would serve.

    Kinds that were not judged in time are left out of what the candidate serves.
    """
    behaviour = candidate.make()
    observation, budget = trials.observation, trials.budget
    distinct: dict[str, list[Site]] = {}
    others = [other for site in behaviour.sites for other in site.others]
    for site in (*behaviour.sites, *others):
        distinct.setdefault(kind_of(site), []).append(site)
    kinds = sorted(distinct, key=lambda kind: -len(distinct[kind]))
    enough = budget.spent() + _SHARE * budget.seconds
    longest = 0.0
    judged: set[str] = set()
    try:
        with trials.kept.untouched(), budget.limit(0.2 * budget.seconds):
            for kind in kinds:
                started = budget.spent()
                least = len(judged) < _LEAST_KINDS
                if not least and started > enough:
                    break
                # One that hangs must not use up what the search has for all others.
                with budget.limit(None if least else max(enough - started, _PATIENCE * longest)):
                    verdict = _judge_site(behaviour, distinct[kind][0], observation)
                if not verdict.passed:
                    return verdict
                judged.add(kind)
                longest = max(longest, budget.spent() - started)
    except KeyboardInterrupt:
        raise
    except (compiling.DeadlinePassed, BudgetSpent):
        if len(judged) < _LEAST_KINDS:
            return Verdict(False, "deadline", "judging the kernel alone took more than a fifth of the budget")
    except BaseException as error:  # noqa: BLE001 - a stranger's kernel may raise anything
        return rejected("error", summary(error))
    candidate.left_out.update(distinct.keys() - judged)
    return passed()


def _judge_site(behaviour: Any, site: Site, observation: Any) -> Verdict:
    spec = behaviour.spec
    known = site.weights()
    kernel = callable_for(spec, site)
    changing: frozenset[str] = frozenset()
    if spec.setup is not None:
        # Packed weights are fixed: the kernel cannot follow others.
        fixed = frozenset(name for name, value in known.items() if isinstance(value, torch.Tensor))
    else:
        # Large weights stay as they are: to draw them anew for every probe takes longer than the probes. The
        # trial judges their gradients, with the whole model's.
        fixed = changing = frozenset(
            name
            for name, value in known.items()
            if isinstance(value, torch.Tensor) and value.numel() > _LARGE
        )
    with torch.no_grad():
        arguments = _detached(site.arguments(**_activations(site, observation)))
        return judge_kernel(
            kernel,
            behaviour.reference(),
            inputs_like(arguments, fixed=fixed),
            level=spec.level,
            backward=spec.backward and observation.training,
            fixed=fixed,
            changing=changing,
            few=_few_rows(arguments),
            reproducible=spec.reproducible,
        )


def _few_rows(arguments: dict[str, Any]) -> int | None:
    """How many rows suffice where those of the site are many; None where they are few or cheap."""
    tensors = {name: v for name, v in arguments.items() if isinstance(v, torch.Tensor)}
    elements = sum(tensor.numel() for tensor in tensors.values())
    rows = max((t.shape[-2] for n, t in tensors.items() if t.dim() > 1 and not is_weight(n)), default=0)
    return _FEW_ROWS if elements > _MANY and rows > _FEW_ROWS else None


def _activations(site: Site, observation: Any) -> dict[str, Any]:
    """The arguments of a call that the site saw; the tensors' values are drawn, here and by the judge."""
    if not site.examples:
        return {}
    example = site.examples[0]
    device = torch.device(example.device)
    made: dict[str, Any] = {**example.values, **dict.fromkeys(example.callers, site.module)}
    for name, shape in example.shapes.items():
        dtype = getattr(torch, example.dtypes[name].removeprefix("torch."))
        if dtype.is_floating_point:
            made[name] = torch.randn(shape, device=device).to(dtype)
        elif dtype is torch.bool:
            made[name] = torch.ones(shape, dtype=dtype, device=device)
            if len(shape) > 2:  # of queries and keys: one that masks nothing would not tell who ignores it
                made[name] = made[name].tril(shape[-1] - shape[-2])
        else:
            low, high = site.binding.hypothesis.integers.get(name, (0, 1))
            made[name] = torch.randint(low, high, shape, device=device).to(dtype)
    return made


def _detached(known: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in known.items()}
