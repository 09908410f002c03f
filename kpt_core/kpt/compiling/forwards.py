"""Forwards that run as compiled graphs."""

from __future__ import annotations

import builtins
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import CodeType, FunctionType
from typing import Any

import torch

from kpt.compiling.call_structure import named_tensors, negative_zeros, structure_of
from kpt.compiling.collecting import FurtherInputs, collecting
from kpt.compiling.detaching import detaching, outside_of_inference_mode, without_gradients
from kpt.compiling.torch_compiler import (
    errors_kept,
    forget_modules,
    loaded_modules,
    marked_dynamic,
    release_guards,
    settings_of,
)
from kpt.error_text import add_note

GraphPass = Callable[[torch.fx.GraphModule, list[Any]], torch.fx.GraphModule]
Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]

#: Memoised structures per instance; the table is emptied when it is full.
TABLE_LIMIT = 4096
#: Structures that one instance compiles at most.
GRAPH_LIMIT = 64

_compiling = threading.RLock()
#: Those that are compiling, the innermost last.
active: list[CompiledForward] = []


class NothingCaptured(RuntimeError):
    """A forward holds no tensor operation that could be compiled, or dynamo was told to leave it alone."""


class _Thread(threading.local):
    executions = 0


_thread = _Thread()


def executions_of_thread() -> int:
    """How many calls of compiled forwards ran compiled code in this thread."""
    return _thread.executions


def _entry(*args: Any, **kwargs: Any) -> Any:
    return _forward(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821 - in each instance's globals


def _backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """The one backend that dynamo knows of (it keeps each for ever); the active instance compiles."""
    return active[-1]._lower(graph, example_inputs)


class CompiledForward:
    """A forward that runs as one compiled graph per input structure.

    ``forward`` is called with the arguments of each call, normally a bound method. ``backend`` is
    the name of a dynamo backend or a function of (graph, example inputs). ``inductor_config`` and
    ``dynamo_config`` hold while compiling. ``dynamic_dims`` maps an argument's name (see
    `named_tensors`) to its dynamic axes: ``{"input_ids": {0: "batch", 1: "sequence"}}``; all other
    sizes are static. ``graph_pass(graph, example_inputs)`` may replace nodes of the captured graph
    before the backend sees it. ``around_compilation`` makes a context that compilation runs in, for
    what is no configuration of the compiler's. ``further`` are `FurtherInputs`, if any.

    Counters: ``graphs`` compiled, ``executions`` of compiled code, ``misses`` (calls that ran the
    original forward), ``compile_seconds``. Calls are thread-safe; compilation takes a process-wide
    lock.

    Raises what dynamo or the backend raises when a call can't be compiled as a whole graph, with what torch
    logged of it as ``__notes__``, and `NothingCaptured` when it holds no tensor operation to compile.
    """

    #: Whether one that is made around it takes its passes over, after which it is ``idle``.
    gives_way = False
    idle = False

    def __init__(
        self,
        forward: Callable[..., Any],
        *,
        backend: str | Backend = "inductor",
        inductor_config: Mapping[str, Any] | None = None,
        dynamo_config: Mapping[str, Any] | None = None,
        dynamic_dims: Mapping[str, Mapping[int, Any]] | None = None,
        graph_pass: GraphPass | None = None,
        around_compilation: Callable[[], AbstractContextManager[Any]] | None = None,
        further: FurtherInputs | None = None,
        label: str = "",
    ) -> None:
        created = collecting()
        source = created.inherit() if created is not None else None
        if isinstance(forward, CompiledForward) and forward.gives_way:  # its graph and ours are one
            forward.idle = True
            source = source or forward
            forward = forward.forward
        inherited = source.passes if source is not None else ()
        forward = further.taken_by(forward) if further is not None else forward
        self.forward: Callable[..., Any] = forward
        self.backend = backend
        self.inductor_config = dict(inductor_config or {})
        self.dynamo_config = dict(dynamo_config or {})
        self.dynamic_dims = {name: dict(axes) for name, axes in (dynamic_dims or {}).items()}
        self.graph_pass = graph_pass
        self.around_compilation = around_compilation
        # Only the forward that they were made for takes them, and no block within it.
        inherited_inputs: FurtherInputs | None = None
        if source is not None and self.forward is source.forward:
            inherited_inputs = source.further
        self.further: FurtherInputs | None = further or inherited_inputs
        if self.further is not None:
            self.dynamic_dims |= {name: dict(axes) for name, axes in self.further.dims.items()}
        self.label = label
        self.passes: tuple[GraphPass, ...] = (*inherited, graph_pass) if graph_pass is not None else inherited
        self.graphs = 0
        self.compile_seconds = 0.0
        self.sealed = False
        self._executions = itertools.count()
        self._misses = itertools.count()
        self._table: dict[Any, Callable[..., Any]] = {}
        self._compiled: list[tuple[Any, Callable[..., Any], frozenset[Any]]] = []
        self._modules: list[Any] = []
        self._environments: list[Any] = []
        try:
            self._signature: inspect.Signature | None = inspect.signature(forward)
        except (TypeError, ValueError):
            self._signature = None
        self._globals: dict[str, Any] = {
            "__builtins__": builtins,
            "__name__": __name__,
            "_forward": forward,
        }
        # code.replace() always makes a new object, and dynamo keeps its cache on the code object.
        self._function: FunctionType | None = FunctionType(
            _entry.__code__.replace(co_name="compiled_forward"), self._globals, "compiled_forward"
        )
        if created is not None:
            created.append(self)

    # -- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.further is not None:
            kwargs = {**kwargs, **self.further.make(args, kwargs)}
        target = self._table.get(key := structure_of(args, kwargs))
        if target is None or key is None:
            target = self._select(key, args, kwargs)
            if target is None:
                next(self._misses)
                return self.forward(*args, **kwargs)
        next(self._executions)
        _thread.executions += 1
        return target(*args, **kwargs)

    def lookup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """The compiled code memoised for calls like this one, or None. Calls made to it are not counted.

        None, too, where the code takes `FurtherInputs`.
        """
        if self.further is not None:
            return None
        key = structure_of(args, kwargs)
        return self._table.get(key) if key is not None else None

    @property
    def __code__(self) -> CodeType:
        """That of the original forward: dynamo looks for it where it traces an `fx.GraphModule`."""
        code: CodeType = self.forward.__code__  # type: ignore[attr-defined]
        return code

    @property
    def executions(self) -> int:
        """How many calls ran compiled code."""
        return int(self._executions.__reduce__()[1][0])

    @property
    def misses(self) -> int:
        """How many calls ran the original forward instead of compiled code."""
        return int(self._misses.__reduce__()[1][0])

    def _select(
        self, key: tuple[Any, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """The compiled code for a structure that isn't memoised; compile it if that is allowed."""
        target, unknown = self._satisfied(args, kwargs)
        if unknown and not self.sealed:
            with _compiling:
                target, unknown = self._satisfied(args, kwargs)
                if unknown:
                    target = self._compile(args, kwargs)
        if unknown and self.sealed and target is None and not torch.is_grad_enabled():
            target = self._without_autograd(args, kwargs)
        if target is not None and key is not None:
            if len(self._table) >= TABLE_LIMIT:
                self._table.clear()
            self._table[key] = target
        return target

    def _without_autograd(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """The compiled code for these inputs detached and seen from outside of inference mode.

        Where no gradient is recorded it computes the same for them. Dynamo's guards tell them apart.
        """
        plain, named, own = without_gradients(args, kwargs)
        with torch.inference_mode(False), torch.no_grad():
            target = self._satisfied(*outside_of_inference_mode(plain, named))[0]
        return detaching(target) if own and target is not None else target

    def _satisfied(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any] | None, bool]:
        """The first compiled code whose guards all hold for this call, and whether none holds.

        Dynamo's guards take -0.0 for 0.0, and so would dynamo when it was asked to compile: a call that
        differs in that only has no code, and is not to be compiled either.
        """
        local_values = {"args": args, "kwargs": kwargs}
        unknown = True
        for guards, target, zeros in self._compiled:
            if guards.check(local_values):
                unknown = False
                if zeros == negative_zeros((args, kwargs)):
                    return target, False
        return None, unknown

    # -- compiling

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        if self._function is None:
            raise RuntimeError(f"{self!r} was disposed of and can't compile; make a new one")
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

        started, graphs = time.perf_counter(), self.graphs
        known = {id(entry.code) for entry in _debug_get_cache_entry_list(self._function.__code__)}
        # torch.compile would wrap the backend anew each time, and dynamo keeps every backend it has seen.
        compiled = torch._dynamo.optimize(_backend, nopython=True, dynamic=False)(self._function)
        active.append(self)
        try:
            with ExitStack() as stack:
                stack.enter_context(
                    settings_of(
                        {"recompile_limit": GRAPH_LIMIT, **self.dynamo_config},
                        self.inductor_config,
                        dynamic=bool(self.dynamic_dims),
                    )
                )
                if self.around_compilation is not None:
                    stack.enter_context(self.around_compilation())
                stack.enter_context(loaded_modules(self._modules))
                if self.dynamic_dims:
                    tensors = named_tensors(self._signature, args, kwargs)
                    stack.enter_context(marked_dynamic(tensors, self.dynamic_dims))
                said = stack.enter_context(errors_kept())
                try:
                    compiled(*args, **kwargs)
                except Exception as error:
                    for note in said:
                        add_note(error, note)
                    raise
        finally:
            active.pop()
            self.compile_seconds += time.perf_counter() - started
        fresh = [
            entry
            for entry in _debug_get_cache_entry_list(self._function.__code__)
            if id(entry.code) not in known
        ]
        if self.graphs == graphs or not fresh:
            raise NothingCaptured(f"{self!r}: no graph was compiled for this call; leave this forward eager")
        for entry in fresh:
            # What dynamo made of the frame, called as a plain function: no frame hook, no guards.
            target = FunctionType(entry.code, self._globals, "compiled_forward")
            self._compiled.append((entry.guard_manager, target, negative_zeros((args, kwargs))))
        return target

    def _lower(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.fake_mode is not None:
            self._environments.append(context.fake_mode.shape_env)
        for change in self.passes:
            graph = change(graph, example_inputs)
        backend = self.backend
        if isinstance(backend, str):
            backend = torch._dynamo.lookup_backend(backend)
        lowered = backend(graph, example_inputs)
        self.graphs += 1
        return lowered

    def constants(self) -> list[torch.Tensor]:
        """Tensors that belong to inductor's generated code: frozen and packed weights."""
        return [v for module in self._modules for v in vars(module).values() if isinstance(v, torch.Tensor)]

    def members(self) -> Iterator[CompiledForward]:
        """Those that compile: itself, or the parts of a `CompiledModule`."""
        yield self

    # -- life

    def seal(self) -> None:
        """From now on never compile: calls without compiled code run the original forward."""
        self.sealed = True

    def dispose(self) -> None:
        """Free compiled code, guards and constants. Later calls run the original forward."""
        self.sealed = True
        self._free()
        if self._function is not None:
            from torch._dynamo.eval_frame import remove_from_cache

            remove_from_cache(self._function)
            self._function = None
        # Emptied, but with its keys: dynamo deletes those that it added when the code object dies.
        self._globals.update(dict.fromkeys(self._globals))

    def _free(self) -> None:
        """Free what was compiled."""
        self._table.clear()
        # The stand-in of an input that is a view holds that of its base where Python's collector does not
        # look, and both hold what lists them: without an end to the list, none of them would ever go.
        for environment in self._environments:
            if environment is not None and environment.tracked_fakes:
                environment.tracked_fakes.clear()
        self._environments.clear()
        release_guards([guards for guards, *_ in self._compiled])
        self._compiled.clear()
        if self._modules:
            forget_modules(self._modules)
        self._modules.clear()

    def __repr__(self) -> str:
        name = self.label or getattr(self.forward, "__qualname__", type(self.forward).__name__)
        return (
            f"CompiledForward({name}, graphs={self.graphs}, executions={self.executions}, "
            f"misses={self.misses}, sealed={self.sealed})"
        )
