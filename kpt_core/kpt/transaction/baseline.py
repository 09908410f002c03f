"""Stage 2: what is right, and how fast the untouched model is. Nothing is changed before this is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kpt.error_text import summary
from kpt.judge import distances, kinds, outputs
from kpt.judge.calls import Call
from kpt.judge.kinds import Kind
from kpt.judge.state import untouched
from kpt.transaction import workspace
from kpt.transaction.execution import Execution, Runner, seeded
from kpt.transaction.freememory import free_memory

if TYPE_CHECKING:
    from kpt.transaction.observe import Observation

#: The fp64 copy may take this share of the free memory.
_MEMORY_SHARE = 0.25
#: Relative error of eager's outputs above which the fp64 copy is no reference for them.
_NOTHING_IN_COMMON = 0.25


@dataclass
class Expected:
    """What one call has to give: the reference, and the eager model's own answer beside it.

    ``given`` is the clone of ``call`` that the eager model was called with, ``changes`` names the global
    state that eager changed (random states that it draws from, say).
    """

    call: Call
    given: Call
    reference: Execution
    eager: Execution
    padded: bool = False
    changes: frozenset[str] = frozenset()
    casts: dict[str, Execution] = field(default_factory=dict)


class Baseline:
    """The untouched model as a private copy, its fp64 twin, and fresh inputs for both.

    ``reference_dtype`` is "float64", or the model's own when the fp64 copy does not fit or cannot
    run; ``reference_note`` says why.
    """

    def __init__(self, observation: Observation, plain: torch.nn.Module, *, seed: int) -> None:
        self.observation = observation
        self.plain = plain
        #: The model whose values are judged: without dropout where that decides the outputs.
        self.judged = workspace.without_dropout(plain) if observation.stochastic else plain
        self.runner = Runner(plain, training=observation.training)
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self._exact: tuple[torch.nn.Module, Runner] | None = None
        self._casts: dict[str, tuple[torch.nn.Module, Runner]] = {}
        self.keep_integers = False
        self.reference_dtype = "float64"
        self.reference_note = ""
        self._prepare_reference()

    def _prepare_reference(self) -> None:
        floats = [t for t in (*self.plain.parameters(), *self.plain.buffers()) if t.is_floating_point()]
        need = sum(t.numel() * 8 for t in floats)
        free = free_memory(self.observation.device_type)
        if need > _MEMORY_SHARE * free:
            self._no_reference(f"the fp64 copy needs {need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free")
            return
        call = self.observation.calls[0]
        if self._is_random(call):
            self._no_reference("the outputs depend on random numbers, and arithmetic in fp64 draws others")
            return
        try:
            twin = workspace.cast_copy(self.judged, torch.float64)
            runner = Runner(twin, training=self.observation.training)
            result = runner.collect(twin.forward, cast_call(call, torch.float64))
        except Exception as error:  # noqa: BLE001 - upstream code without an fp64 path; the receipt says so
            self._no_reference(f"the model cannot run in fp64 ({summary(error)})")
            return
        if not outputs.tensors(result.output):
            self._no_reference("the model returns no tensor")
            return
        other = self._something_else(call, result.output)
        if other is not None:
            self._no_reference(f"the model computes something else in fp64 ({other})")
            return
        self._exact = (twin, runner)

    def _something_else(self, call: Call, reference: Any) -> str | None:
        """An output of which eager and the reference have little in common, as where a forward asks for its
        dtype: its error would be eager's own, and allowed to everybody."""
        eager = outputs.tensors(self.runner.collect(self.judged.forward, call.clone()).output)
        for name, expected in outputs.tensors(reference).items():
            own = eager.get(name)
            if own is None or own.shape != expected.shape:
                return f"{name} is missing or of another shape"
            if own.is_floating_point() or own.is_complex():
                measured = distances.distance(own, expected)
                if measured.relative > _NOTHING_IN_COMMON and measured.scale > 0.0:
                    return f"{name} is off by {measured.relative:.0%}"
        return None

    def _is_random(self, call: Call) -> bool:
        """Whether the judged model's outputs follow the random state, as a layer that adds noise makes them.

        A reference that drew other numbers would be far from eager, and allow everybody to be as far.
        """
        results = []
        for seed in (1, 2):
            with seeded(seed):
                with untouched() as changes:
                    results.append(self.runner.collect(self.judged.forward, call.clone(), seed=seed).output)
            if not any(name.startswith("random state") for name in changes.names):
                return False
        return outputs.identical(*results) is not None

    def _no_reference(self, note: str) -> None:
        dtypes = sorted(self.observation.parameter_dtypes) or ["float32"]
        self.reference_dtype = dtypes[0]
        self.reference_note = note

    def expected(self, call: Call, *, seed: int, padded: bool = False) -> Expected:
        """Reference and eager results of ``call``.

        Raises whatever eager raises: such a draw is dropped by the caller.
        """
        with seeded(seed):
            given = call.clone()
            with untouched() as changes:
                eager = self.runner.collect(self.judged.forward, given, seed=seed)
        reference = eager
        if self._exact is not None:
            twin, runner = self._exact
            with seeded(seed):
                reference = runner.collect(twin.forward, cast_call(call.clone(), torch.float64), seed=seed)
        return Expected(call, given, reference, eager, padded, frozenset(changes.names))

    def cast(self, expected: Expected, dtype: str, *, seed: int) -> Execution | None:
        """What the plain eager model gives when it is cast to ``dtype``; None if it cannot run so."""
        if dtype not in expected.casts:
            if dtype not in self._casts:
                module = workspace.cast_copy(self.judged, getattr(torch, dtype))
                self._casts[dtype] = (module, Runner(module, training=self.observation.training))
            module, runner = self._casts[dtype]
            try:
                with seeded(seed):
                    expected.casts[dtype] = runner.collect(
                        module.forward, cast_call(expected.call.clone(), getattr(torch, dtype)), seed=seed
                    )
            except Exception:  # noqa: BLE001 - this model has no such eager path: judged by the other rules alone
                return None
        return expected.casts[dtype]

    def draw(self, *, keep_integers: bool | None = None, **options: Any) -> Call:
        """A fresh call like the examples; integers are the examples' own where eager refused others.

        ``options`` are those of the spec's own `draw`.
        """
        keep = self.keep_integers if keep_integers is None else keep_integers
        return self.observation.spec.draw(self.generator, keep_integers=keep, **options)

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of the examples, of which the clock draws in turn."""
        return kinds.of_examples(
            self.observation.spec, lambda examples: self.draw(examples=examples, own_masks=True)
        )

    def runs(self, call: Call) -> bool:
        """Whether eager accepts ``call`` at all (a length beyond a table of positions, say)."""
        with torch.no_grad(), self.runner.buffers_kept():
            try:
                given = call.clone()
                self.plain.forward(*given.args, **given.kwargs)
            except Exception:  # noqa: BLE001 - any refusal means that there is nothing to prepare for
                return False
        return True

    def close(self) -> None:
        self._exact = None
        self._casts.clear()


def cast_call(call: Call, dtype: torch.dtype) -> Call:
    """``call`` with its floating-point (and complex) tensors in ``dtype``."""
    return call.map_tensors(lambda tensor: tensor.to(workspace.cast_dtype(tensor, dtype)))
