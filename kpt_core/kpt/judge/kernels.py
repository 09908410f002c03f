"""Judge one kernel against its op's reference, on inputs that look for what kernels get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from kpt.judge.kernel_inputs import MakeInputs, inputs_like, is_weight
from kpt.judge.kernel_probes import Trial
from kpt.judge.layouts import LAYOUTS
from kpt.judge.referee import as_dtype
from kpt.judge.verdict import Verdict, passed
from kpt.specs import Level

__all__ = ["MakeInputs", "inputs_like", "is_weight", "judge_kernel"]

#: Rows that are tried: one, and odd numbers that no power-of-two block divides.
ROWS = (1, 7, 33)
#: Factors on the activations: small inputs reveal a wrong epsilon, larger ones a saturation.
SCALES = (1e-2, 8.0)
#: A factor at which exponentials overflow that are not taken over a maximum.
LARGE = 300.0


def judge_kernel(
    run: Callable[..., Any],
    reference: Callable[..., Any],
    make_inputs: MakeInputs,
    *,
    level: Level = "exact",
    backward: bool = False,
    dtypes: Sequence[torch.dtype] = (),
    compute_dtype: torch.dtype | str | None = None,
    fixed: Collection[str] = (),
    changing: Collection[str] = (),
    few: int | None = None,
    ordinary: bool = True,
    rows: Sequence[int] = ROWS,
    layouts: Sequence[str] = LAYOUTS,
    scales: Sequence[float] = SCALES,
    reproducible: bool = False,
    seed: int = 0,
) -> Verdict:
    """Judge ``run``, which has the op's signature, against ``reference`` in fp64.

    Every probe draws its inputs afresh. The first rejection is returned: ``value``, ``nan``,
    ``shape``, ``dtype``, ``structure`` or ``error`` on ordinary inputs; ``unwritten`` where memory that
    was never written is part of the result; ``input-modified``; ``replay`` where a result follows an
    earlier call or is overwritten by a later one; ``size`` and ``stride`` where only other row numbers or
    memory layouts go wrong; ``gradient``; ``nondeterministic`` if ``reproducible`` was promised.

    Args:
        make_inputs: see `MakeInputs`; arguments that the reference cannot run are dropped.
        backward: judge gradients of every floating-point argument that is not ``fixed``.
        dtypes: dtypes to cast floating-point arguments to, each judged; by default as drawn.
        compute_dtype: the dtype that the kernel's arithmetic drops to, see `judge`.
        fixed: names of arguments that are passed on untouched (packed weights).
        changing: those of ``fixed`` that are only too large to be drawn anew; a copy of them changes between
            two calls.
        scales: factors on the activations; with any, results also have to stay finite at `LARGE`.
        few: rows for the probes that look at scales and layouts, where those of the site take too long.
        ordinary: begin with the ordinary inputs, memory that is never written and replays; False where they
            were judged before, and only what the other arguments ask for is looked at.

    Raises:
        ValueError: the reference cannot run the ordinary inputs.
    """
    figures: dict[str, float] = {"probes": 0.0}
    for dtype in tuple(dtypes) or (None,):
        trial = Trial(
            run, reference, make_inputs, level, as_dtype(compute_dtype), frozenset(fixed), dtype, seed, few
        )
        probes: list[Callable[[], Verdict | None]] = []
        if ordinary:
            probes += [trial.plain, trial.unwritten, trial.replay]
        if changing:
            probes.append(partial(trial.new_weights, tuple(changing)))
        probes += [partial(trial.scaled, factor) for factor in scales]
        if scales:
            probes.append(partial(trial.overflowing, LARGE))
        probes += [partial(trial.sized, number) for number in rows]
        probes += [partial(trial.strided, layout) for layout in layouts]
        if reproducible:
            probes.append(trial.repeated)
        if backward:
            probes += [trial.gradients, trial.partial_gradients]
            probes += [partial(trial.strided_gradients, layout) for layout in ("expanded", "transposed")]
            probes += [partial(trial.gradients, number) for number in rows[1:2]]
            probes += [partial(trial.gradients, None, layout) for layout in layouts]
        for probe in probes:
            verdict = probe()
            if verdict is None:
                continue
            figures["probes"] += 1
            for name, value in verdict.figures.items():
                figures[name] = max(figures.get(name, -math.inf), value)
            if not verdict.passed:
                detail = f"{verdict.detail} ({dtype})" if dtype is not None else verdict.detail
                return Verdict(False, verdict.rule, detail, figures)
    return passed(figures=figures)
