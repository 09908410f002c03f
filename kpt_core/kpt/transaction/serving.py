"""A committed plan serves calls: its guard, its counters, and what it does where a call is none of its own.

A call takes the optimised path only if its inputs, the mode, the weights and the model's structure
are those that the referee saw (or differ only in dimensions that were declared dynamic). Everything
else runs the original forward and is counted with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from kpt.transaction.again import Again
from kpt.transaction.ambient import ambient_state, default_devices, transformed
from kpt.transaction.arguments import MISSING, key_of, layout_key, share_memory, tensors_in
from kpt.transaction.call_counter import Counter, peek
from kpt.transaction.dispatch import forward_of_class, own_forward
from kpt.transaction.lazy_backward import with_backward
from kpt.transaction.signature import Canonical, constant_defaults, defaults_in

if TYPE_CHECKING:
    from kpt.compiling import CompiledForward
    from kpt.transaction.guard import InputGuard
    from kpt.transaction.watch import Watch

_MAX_KEYS = 4096
_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_deterministic = torch._C._get_deterministic_algorithms
_default_dtype = torch.get_default_dtype
_inference_mode = torch.is_inference_mode_enabled
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


class Plan:
    """A committed plan: the optimised forward, its guard, and its counters.

    ``run`` is the workspace's root forward; ``direct`` the same when it is one compiled forward, of
    which the code for a known call is then called without asking it again.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        run: Callable[..., Any],
        inputs: InputGuard,
        watch: Watch,
        *,
        training: bool,
        executions: Callable[[], int] | None = None,
        ambient: tuple[Any, ...] = (),
        direct: CompiledForward | None = None,
        misses: Callable[[], dict[str, int]] | None = None,
        writes_inputs: bool = False,
        detached: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset()),
        unrepeatable: str = "",
    ) -> None:
        self.run = run
        self.previous = own_forward(model)
        self.inputs = inputs
        self.watch = watch
        self.training = training
        self._flag = model.training
        self._writes_inputs = writes_inputs
        self._detached = detached
        self._unrepeatable = unrepeatable
        # In training mode a call with gradients is a training step, and one without is inference.
        self._strict = model.training and any(p.requires_grad for p in model.parameters())
        self.fallbacks = Counter()
        self.executions = executions
        self.direct = direct
        self._targets: dict[Any, Callable[..., Any]] = {}
        self._optimized = itertools.count()
        self._misses = misses if misses is not None else dict[str, int]
        self._missed_before = self._misses()
        self._canonical = Canonical(self.original(model))
        self._names = self._canonical.names
        self._defaults = constant_defaults(self.original(model))
        #: The defaults that examples passed, in each way that some example did it.
        self._passed: list[dict[str, Any]] = []
        for constants in inputs.constants:
            if (passed := defaults_in(constants, self._defaults)) not in self._passed:
                self._passed.append(passed)
        self._known: dict[Any, str | None] = {}
        #: The form of calls that come again and again, and the key of the last one that was looked up.
        self._repeated: Again | None = None
        self._last: Any = None
        #: By the key of a call unlike an example in defaults: what to leave out, what to pass, the key then.
        self._served_as: dict[Any, tuple[frozenset[str], dict[str, Any], Any]] = {}
        self._ambient = ambient or ambient_state()
        self._autocast, self._reproducible, self._dtype = bool(self._ambient[0]), *self._ambient[1:3]
        self._devices: tuple[str, ...] | None = self._ambient[4]
        self._function_modes = len(self._devices or ())
        self._parameters = tuple(model.parameters())
        self._modes = tuple((module, module.training) for module in model.modules())
        self.switched_off: str | None = None
        self.committed: Any = None

    def calls(self) -> dict[str, Any]:
        """Calls so far: on the optimised path, on the original one and why, and ``misses``.

        The latter are calls of single kernels or compiled blocks, inside optimised calls, that ran the
        original code of that part: counts by part and site.
        """
        self.watch.look_again()
        reasons = self.fallbacks.to_dict()
        now, before = self._misses(), self._missed_before
        return {
            "optimized": self.optimized_calls,
            "fallback": sum(reasons.values()),
            "reasons": reasons,
            "misses": {part: n for part, count in now.items() if (n := count - before.get(part, 0)) > 0},
        }

    def reset_counters(self) -> None:
        """Start counting from zero: calls made by the transaction itself are no calls of the user."""
        self._optimized = itertools.count()
        self.fallbacks = Counter()
        self._missed_before = self._misses()

    @property
    def optimized_calls(self) -> int:
        return peek(self._optimized)

    def original(self, model: torch.nn.Module) -> Callable[..., Any]:
        """The user's own forward."""
        return self.previous if self.previous is not None else forward_of_class(model)

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        grad = _is_grad_enabled()
        reason = self._unusual(model, grad)
        if reason is None:
            again = self._repeated
            if again is not None and again.grad is grad:
                named = again.named(args, kwargs)
                if named is not None:
                    reason = self.watch.stale(grad)
                    if reason is None:
                        next(self._optimized)
                        return again.target(**named)
        if reason is None:
            if args:
                args, kwargs = self._canonical(args, kwargs)
            key, reason = self._miss(args, kwargs)
            if reason is None:
                reason = self.watch.stale(grad)
            elif self._defaults:
                args, kwargs, key, reason = self._as_proven(args, kwargs, key, reason)
                reason = reason or self.watch.stale(grad)
            if self._writes_inputs and reason is None and share_memory((*args, *kwargs.values())):
                reason = "the forward writes to an input that shares memory with another"
            if self._unrepeatable and reason is None and not self.training:
                given = _tensors_of(args, kwargs)
                # A backward would run the original forward a second time.
                if (grad and self._sources(given)) or any(tensor.requires_grad for tensor in given):
                    reason = f"a gradient may be asked for, and the forward {self._unrepeatable}"
        if reason is not None:
            self.fallbacks.add(reason)
            return self.original(model)(*args, **kwargs)
        if self.direct is not None and not grad:
            target = self._targets.get(key)
            if target is not None and not _twice(args, kwargs):
                next(self._optimized)
                self._expect_again(key, args, kwargs, grad, target)
                return target(*args, **kwargs)
            self._remember(key, args, kwargs)
        if self.executions is None:
            next(self._optimized)
            self._expect_again(key, args, kwargs, grad, self.run)
            return self._optimised(model, args, kwargs, grad)
        before = self.executions()
        result = self._optimised(model, args, kwargs, grad)
        if self.executions() == before:
            self.fallbacks.add("the compiled code's own guard refused the call")
        else:
            next(self._optimized)
        return result

    def _unusual(self, model: torch.nn.Module, grad: bool) -> str | None:
        """What speaks against the plan whatever the call is, or None."""
        reason = self.watch.reason or self.switched_off
        if reason is not None:
            return reason
        if model.training is not self._flag or (self._strict and grad is not self.training):
            return _mode_reason(model, self._flag, grad)
        if (
            _any_autocast() is not self._autocast
            or _deterministic() is not self._reproducible
            or _default_dtype() is not self._dtype
            or _function_modes() != self._function_modes
            or _dispatch_modes()
            or _transform() is not None
            or forward_ad._current_level >= 0
            or (self._autocast and ambient_state()[0] != self._ambient[0])
            or (self._function_modes and default_devices() != self._devices)
        ):
            return self._ambient_reason()
        if (  # `global_hooks()`, without a call
            _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        ):
            return "a global module hook is registered"
        return None

    def _expect_again(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool, target: Callable[..., Any]
    ) -> None:
        """Note the form of a call that came twice in a row, where ``target`` is all that serves it."""
        if key != self._last:
            self._last = key
        elif not (args or self._writes_inputs or self._unrepeatable or (grad and not self.training)):
            if Again.knows(kwargs):
                self._repeated = Again(kwargs, target, grad, self._names)

    def _optimised(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: bool
    ) -> Any:
        if self.training or not grad:
            return self.run(*args, **kwargs)
        given = _tensors_of(args, kwargs)
        sources = self._sources(given)
        if not sources:
            return self.run(*args, **kwargs)
        return with_backward(
            lambda: self.run(*args, **kwargs),
            lambda: self._again(model, args, kwargs),
            sources,
            given,
            detached=self._detached[any(tensor.requires_grad for tensor in given)],
        )

    def _sources(self, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The parameters, and the tensors of a call, that a gradient may be asked for."""
        sources = tuple(p for p in self._parameters if p.requires_grad)
        return sources + tuple({id(t): t for t in given if t.requires_grad}.values())

    def _again(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original forward as it was when the call was made, in the modes that were set then."""
        now = tuple(model.parameters())
        if len(now) != len(self._parameters) or any(p is not q for p, q in zip(now, self._parameters)):
            raise RuntimeError(
                "a parameter of the model was replaced since the forward whose gradient is asked for; "
                "call backward before weights are replaced"
            )
        changed = [(module, module.training) for module, flag in self._modes if module.training is not flag]
        for module, flag in changed:
            module.__dict__["training"] = not flag
        try:
            return self.original(model)(*args, **kwargs)
        finally:
            for module, flag in changed:
                module.__dict__["training"] = flag

    def _remember(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the compiled code for calls of this key, so that the next one asks no second table."""
        if _twice(args, kwargs):
            return
        target = self.direct.lookup(args, kwargs)  # type: ignore[union-attr]
        if target is not None:
            if len(self._targets) >= _MAX_KEYS:
                self._targets.clear()
            self._targets[key] = target

    def _miss(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
        """The call's key, and why its inputs are outside of what was proven, or None."""
        key: list[Any] = [_inference_mode()]
        name: Any = None
        try:
            for name, value in kwargs.items() if not args else (*enumerate(args), *kwargs.items()):
                if type(value) is _Tensor:
                    dtype = value.dtype
                    plain = value.is_contiguous() and not dtype.is_complex and not value.is_neg()
                    layout = plain or layout_key(value)
                    key.append((name, value.shape, dtype, value.device, layout, value.requires_grad))
                else:
                    part = key_of(value)
                    if part is MISSING:
                        return None, f"argument {name!r} has an unsupported type {type(value).__name__}"
                    key.append((name, part))
        except RuntimeError:  # sparse rows and nested tensors know no contiguity or no shape
            return None, f"argument {name!r} is a tensor of an unsupported layout"
        hashed = tuple(key)
        found = self._known.get(hashed, MISSING)
        if found is not MISSING:
            return hashed, found  # type: ignore[return-value]
        reason = self.inputs.misfit(args, kwargs)
        if len(self._known) >= _MAX_KEYS:
            self._known.clear()
        self._known[hashed] = reason
        return hashed, reason

    def _as_proven(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any, reason: str
    ) -> tuple[tuple[Any, ...], dict[str, Any], Any, str | None]:
        """A call that no example is like, with defaults passed and left out as in an example that it is like.

        Returns the call, its key, and why it is outside of what was proven: a call that is like no example
        comes back as it is, with the reason that is left once defaults make no difference.
        """
        known = self._served_as.get(key)
        if known is not None:
            omitted, passed, proven = known
            kept = {name: value for name, value in kwargs.items() if name not in omitted}
            return args, {**passed, **kept}, proven, None
        same = defaults_in(kwargs, self._defaults)
        kept = {name: value for name, value in kwargs.items() if name not in same}
        misfits: list[str] = []
        for passed in self._passed:
            form = {**passed, **kept}
            if form.keys() == kwargs.keys():
                continue
            proven, misfit = self._miss(args, form)
            if misfit is None:
                # Keys of 0.0 and -0.0 are equal, and what a guard knows no key of has none.
                if key is not None and not any(isinstance(value, float) for value in same.values()):
                    if len(self._served_as) >= _MAX_KEYS:
                        self._served_as.clear()
                    self._served_as[key] = (frozenset(same), passed, proven)
                return args, form, proven, None
            misfits.append(misfit)
        return args, kwargs, key, misfits[0] if same and misfits else reason

    def _ambient_reason(self) -> str:
        if default_devices() is None or _dispatch_modes():
            return "a torch function or dispatch mode is active"
        if transformed():
            return "a function transform (torch.func) or forward-mode differentiation is active"
        now, then = ambient_state(), self._ambient
        if now[0] != then[0]:
            return "autocast differs from when the model was optimised"
        if now[2] != then[2]:
            return f"the default dtype is {now[2]}; proven for {then[2]}"
        if now[4] != then[4]:
            return "the default device differs from when the model was optimised"
        return "torch's deterministic mode differs from when the model was optimised"


def _tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a call is given."""
    return [tensor for value in (*args, *kwargs.values()) for tensor in tensors_in(value)]


def _twice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor is given twice: code for that is not code for two, nor the other way round."""
    tensors = _tensors_of(args, kwargs)
    return len(set(map(id, tensors))) < len(tensors)


def _mode_reason(model: torch.nn.Module, flag: bool, grad: bool) -> str:
    if model.training is not flag:
        return f"the model is in {'training' if model.training else 'evaluation'} mode"
    return f"gradients are {'on' if grad else 'off'} in training mode"
