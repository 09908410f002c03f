"""The forward of a module, compiled as a whole or, where that can't be captured, in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from kpt.compiling.call_structure import named_tensors
from kpt.compiling.forwards import CompiledForward, NothingCaptured
from kpt.compiling.repeats import RepeatedParts
from kpt.error_text import summary
from kpt.specs import replace_forward


class CompiledModule(CompiledForward):
    """Takes the place of ``module``'s forward.

    Where dynamo can't capture that whole (it prints, asks a tensor for its value, calls NumPy or a recurrent
    layer, or is another graph for each size of an axis that is declared dynamic), each of its children takes
    the place, and so on: the largest parts that can be captured are compiled, and what is between them runs
    as it is. Single layers of `torch.nn` are left alone, for which there is nothing to fuse. With
    ``dynamic_dims``, the axes in which the inputs of a part differ from those of its first call are its
    dynamic ones.

    ``settings`` are those of a `CompiledForward`. `dispose` puts the forwards back. ``uncaptured`` is why the
    whole was not captured; ``parts`` are then what took its place. A part that can't be captured either, nor
    any part of it, runs as it is, and so does each kind of call that can't. Guards of parts are evaluated at
    each call, other than those of the whole.
    """

    def __init__(self, module: torch.nn.Module, *, label: str = "", **settings: Any) -> None:
        self.module = module
        self.parts: list[CompiledModule] = []
        self.uncaptured = ""
        self._settings = settings
        self._within: CompiledModule | None = None
        self._first: dict[str, torch.Size] = {}
        super().__init__(module.forward, label=label or type(module).__name__, **settings)
        self._replaced = replace_forward(module, self)

    def members(self) -> Iterator[CompiledForward]:
        """Those that compile: this one, or its parts."""
        if not self.uncaptured:
            yield self
        for part in self.parts:
            yield from part.members()

    @property
    def ran(self) -> bool:
        """Whether compiled code ran: of the whole, or of some part.

        Raises `RuntimeError` where nothing could be captured, with the reason.
        """
        compiled = [each for each in self.members() if each.graphs]
        if self.uncaptured and not compiled:
            raise RuntimeError(f"neither the forward nor a part of it can be captured: {self.uncaptured}")
        return any(each.executions for each in compiled)

    @property
    def told(self) -> str:
        """Which parts were compiled, and why not the whole; empty where it was."""
        if not self.uncaptured:
            return ""
        names = [each.label for each in self.members() if each.graphs]
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"compiled in {len(names)} parts ({listed}); the whole can't be captured: {self.uncaptured}"

    def seal(self) -> None:
        super().seal()
        for part in self.parts:
            part.seal()

    def constants(self) -> list[torch.Tensor]:
        return [*super().constants(), *(each for part in self.parts for each in part.constants())]

    def dispose(self) -> None:
        for part in reversed(self.parts):
            part.dispose()
        super().dispose()
        self._put_back()

    def _put_back(self) -> None:
        if self.module.__dict__.get("forward") is self:
            self._replaced()

    def _select(
        self, key: tuple[Any, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        if self.uncaptured:
            return None
        # Between parts runs code that may change what they depend on: their guards are asked at each call.
        return super()._select(key if self._within is None else None, args, kwargs)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        if self.uncaptured:
            return None
        if self._within is not None and self._settings.get("dynamic_dims"):
            self._look_at_sizes(args, kwargs)
        try:
            try:
                return super()._compile(args, kwargs)
            except ConstraintViolationError as error:
                if self._within is None:
                    children = {} if self._compiled else self._children()
                    if not children:
                        raise
                    self._free()
                    self._open(children, summary(error))
                    return None
                self.dynamic_dims = {}  # the part asks for one size there
                return super()._compile(args, kwargs)
        except (torch._dynamo.exc.TorchDynamoException, NothingCaptured) as error:
            # What a backend refuses would be refused of the parts too.
            if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            if self.graphs and self._within is not None:
                return None  # a call of another kind, which is counted
            children = {} if self.graphs else self._children()
            if not children and self._within is None:
                raise
            self._open(children, summary(error))
            return None

    def _children(self) -> dict[str, torch.nn.Module]:
        """The children that may be parts. What has several parents is left to those that hold it whole."""
        top = self
        while top._within is not None:
            top = top._within
        parents = Counter(id(child) for module in top.module.modules() for child in module.children())
        return {name: child for name, child in _children(self.module).items() if parents[id(child)] == 1}

    def _look_at_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the axes in which these inputs differ from the first ones for dynamic."""
        shapes = {name: each.shape for name, each in named_tensors(self._signature, args, kwargs).items()}
        if not self._first:
            self._first = shapes
            return
        for name, shape in shapes.items():
            first = self._first.get(name, shape)
            for axis, (before, now) in enumerate(zip(first, shape, strict=False)):
                if before != now and len(first) == len(shape):
                    self.dynamic_dims.setdefault(name, {})[axis] = f"{name}_{axis}"

    def _open(self, children: dict[str, torch.nn.Module], why: str) -> None:
        """Let the children compile in place of this one, by the same passes."""
        self.uncaptured = why
        settings = dict(self._settings)
        if isinstance(self.backend, RepeatedParts):
            settings["backend"] = self.backend.across()
        self._put_back()
        for name, child in children.items():
            label = name if self._within is None else f"{self.label}.{name}"
            part = CompiledModule(child, label=label, **settings)
            part.dynamic_dims, part.passes, part._within = {}, self.passes, self
            self.parts.append(part)


def _children(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What ``module`` may call that is worth compiling by itself, by name; lists give their elements."""
    found: dict[str, torch.nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, (torch.jit.ScriptModule, torch.fx.GraphModule)) or _is_compiled(child):
            continue
        if type(child).forward is torch.nn.Module.forward:  # a list or a dictionary is not called
            found |= {f"{name}.{inner}": each for inner, each in _children(child).items()}
        elif next(child.children(), None) is not None or not type(child).__module__.startswith("torch.nn."):
            found[name] = child
    return found


def _is_compiled(module: torch.nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or isinstance(
        module.__dict__.get("forward"), CompiledForward
    )
