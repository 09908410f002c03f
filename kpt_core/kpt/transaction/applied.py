"""A plan applied to a workspace: what a trial judges and what a commit installs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from kpt import compiling
from kpt.error_text import summary
from kpt.transaction import workspace
from kpt.transaction.threads import StartedThreads

if TYPE_CHECKING:
    from kpt.transaction.plan import Candidate, Plan


#: How long one undo may take while a budget runs. The workspace is dropped anyhow; what it frees beside that
#: is its own affair.
_UNDO_SECONDS = 5.0


class StepFailed(Exception):
    """One variant could not be applied, or had no effect; ``step`` names the culprit."""

    def __init__(self, step: Candidate | None, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.rule = rule
        self.reason = reason


class Applied:
    """A workspace of ``model`` with ``plan`` applied.

    `close` undoes the plan, frees compiled code and drops the workspace; an undo that raises, or does not
    come back in a run, is noted in ``undo_errors``.

    ``run`` calls the forward that it is given on some of the examples: a variant that measures what flows
    through the model does it on these. It is not kept: it holds the model, which a committed plan must not.

    Raises:
        StepFailed: a variant's ``apply`` or ``calibrate`` raised, or ``apply`` returned no undo.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        *,
        training: bool,
        run: Callable[[Callable[..., Any]], None],
        undo_errors: list[str] | None = None,
    ) -> None:
        self.plan = plan
        self._threads = StartedThreads()
        self.module: torch.nn.Module | None = workspace.clone(model)
        compiling.zero_padding(self.module)
        self.compiled: list[compiling.CompiledForward] = []
        self._undos: list[tuple[Candidate, Callable[[], None]]] = []
        self.behaviours: list[tuple[Candidate, Any]] = []
        self.setup_seconds = 0.0
        self.undo_errors = undo_errors if undo_errors is not None else []
        flags = {module: module.training for module in self.module.modules()}
        try:
            with compiling.collect() as created:
                for step in plan.steps:
                    self._apply(step, run)
            self.compiled = list(created)
        except BaseException:
            self.compiled = list(created)
            self.close()
            raise
        for module, flag in flags.items():
            module.training = flag

    def _apply(self, step: Candidate, run: Callable[[Callable[..., Any]], None]) -> None:
        method = "apply"
        try:
            behaviour = step.make()
            if step.left_out:
                behaviour.leave_out(step.left_out)
            calibrate = getattr(behaviour, "calibrate", None)
            if calibrate is not None:
                method = "calibrate"
                calibrate(self.module, step.variant, lambda: run(self.forward))
                method = "apply"
            undo = behaviour.apply(self.module, step.variant)
        except (KeyboardInterrupt, compiling.DeadlinePassed, MemoryError):
            raise
        except BaseException as error:
            raise StepFailed(step, "failed", f"{method} raised {summary(error)}") from error
        if not callable(undo):
            raise StepFailed(
                step, "failed", f"apply returned {type(undo).__name__}; expected a function that undoes it"
            )
        self._undos.append((step, undo))
        self.behaviours.append((step, behaviour))

    @property
    def forward(self) -> Callable[..., Any]:
        assert self.module is not None
        return self.module.forward

    @property
    def direct(self) -> compiling.CompiledForward | None:
        """The compiled forward that the workspace's root forward is, if it is one."""
        members = [each for compiled in self.compiled for each in compiled.members()]
        only = members[0] if len(members) == 1 else None
        return only if only is not None and self.forward is only else None

    @property
    def undos(self) -> tuple[Callable[[], None], ...]:
        """What takes each step back, in the order of the plan."""
        return tuple(undo for _, undo in self._undos)

    @property
    def executions(self) -> Callable[[], int] | None:
        """Counts runs of compiled graphs in the thread that asks, or None when the plan compiles nothing."""
        return compiling.executions_of_thread if self.compiled else None

    def misses(self) -> dict[str, int]:
        """Calls of parts of the plan that ran the original code of that part, by part.

        These are kernels whose frozen table did not know what a site was called with, and compiled blocks
        that had no code for the call. A forward that is compiled as a whole counts its own as fallbacks.
        """
        found: dict[str, int] = {}
        for step, behaviour in self.behaviours:
            misses = getattr(behaviour, "misses", None)
            for site, count in (misses() if callable(misses) else {}).items():
                found[f"{step.name} at {site or 'the model'}"] = count
        members = (each for compiled in self.compiled for each in compiled.members())
        for compiled in members if self.direct is None else ():
            if compiled.misses:
                name = f"compiled {compiled.label or 'forward'}"
                found[name] = found.get(name, 0) + compiled.misses
        return found

    def seal(self) -> None:
        """From now on nothing is compiled and no kernel serves what it was not judged on."""
        for compiled in self.compiled:
            compiled.seal()
        for _, behaviour in self.behaviours:
            freeze = getattr(behaviour, "freeze", None)
            if freeze is not None:
                freeze()

    def verify(self) -> None:
        """Every step must have had an effect that can be observed.

        Raises:
            StepFailed: with the rule ``no-effect``.
        """
        for step, behaviour in self.behaviours:
            try:
                applied = bool(behaviour.verify_applied(self.module))
            except (KeyboardInterrupt, compiling.DeadlinePassed):
                raise
            except BaseException as error:
                raise StepFailed(step, "failed", f"verify_applied raised {summary(error)}") from error
            if not applied:
                raise StepFailed(step, "no-effect", "the variant changed nothing that can be observed")
            self._check_accounts(step, behaviour)
        self._threads.look()

    def _check_accounts(self, step: Candidate, behaviour: Any) -> None:
        """What a step tells of itself is asked for in reports: it has to work there, so it is tried here."""
        for name, kind in (("misses", dict), ("effect", str)):
            tell = getattr(behaviour, name, None)
            if not callable(tell):
                continue
            try:
                told = tell()
            except (KeyboardInterrupt, compiling.DeadlinePassed):
                raise
            except BaseException as error:
                raise StepFailed(step, "failed", f"{name} raised {summary(error)}") from error
            if not isinstance(told, kind):
                raise StepFailed(
                    step, "failed", f"{name} returned {type(told).__name__}; expected {kind.__name__}"
                )

    def close(self, *, in_run: bool = True) -> None:
        """Undo every step, the last one first, and free everything.

        Within a run each undo has some seconds; outside of one it is waited for. A Ctrl-C in one undo lets
        the others run before it is raised. Threads that the plan leaves behind are noted.
        """
        interrupted: KeyboardInterrupt | None = None
        while self._undos:
            step, undo = self._undos[-1]
            try:
                with compiling.deadline(_UNDO_SECONDS if in_run else None):
                    undo()
            except KeyboardInterrupt as error:
                interrupted = error
            except compiling.DeadlinePassed:
                self.undo_errors.append(f"{step.name}: undo did not come back and was stopped")
            except BaseException as error:  # noqa: BLE001 - the workspace is dropped anyway; the receipt says so
                self.undo_errors.append(f"{step.name}: undo raised {summary(error)}")
            self._undos.pop()
        if in_run:  # later on, others may have started some
            self._threads.look()
        if left := self._threads.left():
            told = f"threads that it started still run, and cannot be ended: {', '.join(left)}"
            self.undo_errors.append(f"{self.plan.key}: {told}")
        for compiled in self.compiled:
            compiled.dispose()
        self.compiled = []
        self.module = None
        if interrupted is not None:
            raise interrupted
