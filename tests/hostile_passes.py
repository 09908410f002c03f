"""Passes that make `slow_models.Net` about as fast as the honest one does, each wrong in one way."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import types
from typing import Any

import numpy
import torch

import slow_models
from kpt.specs import Skip, Variant
from slow_models import DirectScale, SlowScale, fast_forward


class OnePercent(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.01


class NotANumber(DirectScale):
    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            result.detach().view(-1)[-1] = float("nan")
            return result

        return forward


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


class WrongGradient(DirectScale):
    def replacement(self):
        return lambda self, x: _HalfGradient.apply(fast_forward(self, x))


class NoGradient(DirectScale):
    """Detaches: the layers before it are never trained."""

    def replacement(self):
        return lambda self, x: fast_forward(self, x.detach())


class ContiguousOnly(DirectScale):
    """Reads the storage as if it were contiguous."""

    def replacement(self):
        def forward(self, x):
            strides = torch.empty(x.shape, device="meta").stride()
            return fast_forward(self, x.as_strided(x.shape, strides, x.storage_offset()))

        return forward


class EvenOnly(DirectScale):
    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            if x.shape[0] % 2:
                result = torch.cat([result[:-1], torch.zeros_like(result[-1:])])
            return result

        return forward


class _RootWrapper(DirectScale):
    """Takes the detour out and wraps the root's forward with `around`."""

    def around(self, inner: Any, model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        inner, behaviour = model.forward, self

        def forward(self, x):
            return behaviour.around(inner, self, x)

        model.forward = types.MethodType(forward, model)

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back


class ModifiesInput(_RootWrapper):
    def around(self, inner, model, x):
        result = inner(x.clone())
        x.detach().mul_(0.5)
        return result


class ReplaysLast(_RootWrapper):
    def __init__(self):
        self.last = {}

    def around(self, inner, model, x):
        if x.shape not in self.last:
            self.last[x.shape] = inner(x).detach()
        return self.last[x.shape]


class OneBuffer(_RootWrapper):
    """Right each time, but every call writes to the same memory, as captured graphs do."""

    def __init__(self):
        self.memory = {}

    def around(self, inner, model, x):
        result = inner(x)
        memory = self.memory.setdefault(result.shape, torch.empty_like(result))
        return memory.copy_(result)


class LeavesUnwritten(DirectScale):
    def replacement(self):
        def forward(self, x):
            done = fast_forward(self, x)
            result = torch.empty_like(done)
            result[:-1] = done[:-1]
            return result

        return forward


class WritesParameter(DirectScale):
    """Leaves the weight a little different after each call, in place and seen by torch."""

    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            with torch.no_grad():
                self.weight.mul_(1.0 + 1e-7)
            return result

        return forward


class WritesData(DirectScale):
    """As `WritesParameter`, on a way that leaves no trace in the version counter."""

    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            self.bias.data.add_(1e-6)
            return result

        return forward


class ScalesWeights(DirectScale):
    """Folds a factor into two weights while it is applied: right outputs, changed parameters."""

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        for module in model.modules():
            if isinstance(module, SlowScale):
                module.weight.data.mul_(2.0)
                module.bias.data.mul_(2.0)
                module.forward = types.MethodType(lambda self, x: fast_forward(self, x) * 0.5, module)
        return undo


class ReplacesGradient(DirectScale):
    def replacement(self):
        def forward(self, x):
            self.weight.grad = torch.zeros_like(self.weight)
            return fast_forward(self, x)

        return forward


class HooksGradients(DirectScale):
    """Right here, and from then on no gradient of the user's own steps arrives."""

    def apply(self, model, variant):
        for parameter in model.parameters():
            parameter.register_hook(torch.zeros_like)
            parameter.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
        return super().apply(model, variant)


class EditsUsersModel(DirectScale):
    """Reaches past its workspace, to the user's own modules."""

    def propose(self, observation, hardware):
        EditsUsersModel.model = observation.model
        return super().propose(observation, hardware)

    def apply(self, model, variant):
        EditsUsersModel.model.touched = True
        EditsUsersModel.model.slow.rounds = 1
        EditsUsersModel.model.register_forward_hook(lambda *args: None)
        return super().apply(model, variant)


class ForgetsBuffers(DirectScale):
    """Batch norm with batch statistics, but without moving the running ones."""

    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def forward(self, x):
            return torch.nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

        model.norm.forward = types.MethodType(forward, model.norm)
        return undo


class MovesBuffersTwice(DirectScale):
    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def forward(self, x):
            self.running_mean.mul_(0.9).add_(x.detach().mean(0) * 0.1)
            return type(self).forward(self, x)

        model.norm.forward = types.MethodType(forward, model.norm)
        return undo


class ChangesGlobals(DirectScale):
    """Right, but leaves torch's flags and the process changed after each call."""

    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            torch.set_num_threads(2)
            torch.set_float32_matmul_precision("medium")
            os.environ["HOSTILE"] = "1"
            return result

        return forward


class ChangesLessKnownGlobals(DirectScale):
    """As `ChangesGlobals`, where few would look."""

    def replacement(self):
        def forward(self, x):
            result = fast_forward(self, x)
            torch.set_flush_denormal(True)
            logging.disable(logging.CRITICAL)
            sys.setrecursionlimit(5000)
            gc.set_threshold(10**6)
            torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
            return result

        return forward


class PatchesClass(DirectScale):
    """Right and fast, for every model of the process."""

    def apply(self, model, variant):
        SlowScale.forward = fast_forward
        self.applied = 1
        return lambda: None


class PatchesBase(DirectScale):
    """As `PatchesClass`, on a class that inherits the method."""

    def apply(self, model, variant):
        torch.nn.BatchNorm1d.forward = lambda self, x: torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return super().apply(model, variant)


class PatchesLibrary(DirectScale):
    """Exchanges a function of torch's, as some libraries of kernels do."""

    def apply(self, model, variant):
        batch_norm = torch.nn.functional.batch_norm
        torch.nn.functional.batch_norm = lambda *args, **kwargs: batch_norm(*args, **kwargs)
        slow_models.fast_forward = lambda self, x: fast_forward(self, x)
        return super().apply(model, variant)


class PatchesTorch(DirectScale):
    """As `PatchesLibrary`, of the functions in torch itself."""

    def apply(self, model, variant):
        relu, norm = torch.relu, torch.linalg.norm
        torch.relu = lambda x: relu(x)
        torch.linalg.norm = lambda *args, **kwargs: norm(*args, **kwargs)
        return super().apply(model, variant)


class TakesCtrlC(DirectScale):
    def apply(self, model, variant):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.disable()
        return super().apply(model, variant)


class ReseedsRandom(DirectScale):
    """Right, but every call starts the user's random numbers anew."""

    def replacement(self):
        def forward(self, x):
            torch.default_generator.manual_seed(1)
            random.seed(1)
            return fast_forward(self, x)

        return forward


class ChangesGlobalsOnApply(DirectScale):
    """Wrong, and leaves everything global changed behind it."""

    def apply(self, model, variant):
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.backends.mkldnn.enabled = False
        torch.manual_seed(7)
        random.seed(7)
        numpy.random.seed(7)
        os.environ["HOSTILE"] = "1"
        os.environ.pop("KPT_CACHE_DIR", None)
        os.chdir("/")
        raise RuntimeError("and then it fails")


class UndoRaises(DirectScale):
    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def raising():
            undo()
            raise ValueError("undo is broken")

        return raising


class WrongAndUndoRaises(UndoRaises):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.01


class ApplyRaises(DirectScale):
    def apply(self, model, variant):
        super().apply(model, variant)
        raise RuntimeError("apply is broken")


class ApplyExits(DirectScale):
    def apply(self, model, variant):
        sys.exit(3)


class ForwardExits(DirectScale):
    def replacement(self):
        return lambda self, x: sys.exit(3)


class NoUndo(DirectScale):
    def apply(self, model, variant):
        super().apply(model, variant)


class NoEffect(DirectScale):
    def verify_applied(self, model):
        return False


class VerifyRaises(DirectScale):
    def verify_applied(self, model):
        raise RuntimeError("verify is broken")


class WritesToExamples(DirectScale):
    def propose(self, observation, hardware):
        for call in observation.calls:
            for tensor in call.tensors().values():
                tensor.zero_()
        return super().propose(observation, hardware)


class VerifyIsAmbiguous(DirectScale):
    """Answers with a tensor, whose truth value is an error."""

    def verify_applied(self, model):
        return model.slow.weight > 0.0


class MissesRaise(DirectScale):
    """Right, and could not be reported on."""

    def misses(self):
        raise RuntimeError("misses are broken")


class MissesAreANumber(DirectScale):
    def misses(self):
        return 3


class ProposeRaises(DirectScale):
    def propose(self, observation, hardware):
        raise RuntimeError("propose is broken")


class UnspeakableError(Exception):
    """An error whose message cannot be made."""

    def __str__(self):
        raise RuntimeError("no message")


class ProposeUnspeakable(DirectScale):
    def propose(self, observation, hardware):
        raise UnspeakableError


class ApplyUnspeakable(DirectScale):
    def apply(self, model, variant):
        raise UnspeakableError


class ForwardUnspeakable(DirectScale):
    def replacement(self):
        def raising(self, x):
            raise UnspeakableError

        return raising


class UndoUnspeakable(DirectScale):
    def apply(self, model, variant):
        undo = super().apply(model, variant)

        def unspeakable():
            undo()
            raise UnspeakableError

        return unspeakable


class ProposeExits(DirectScale):
    def propose(self, observation, hardware):
        sys.exit(3)


class ProposesText(DirectScale):
    def propose(self, observation, hardware):
        return ["direct"]


class ProposesNone(DirectScale):
    def propose(self, observation, hardware):
        return None


class ProposesOne(DirectScale):
    def propose(self, observation, hardware):
        return self.variant


class ProposesEndlessly(DirectScale):
    def propose(self, observation, hardware):
        while True:
            yield self.variant


class ProposesNothingMuch(DirectScale):
    def propose(self, observation, hardware):
        return [Skip(None)]


class _WrongField(DirectScale):
    fields: dict[str, Any] = {}

    def propose(self, observation, hardware):
        return [Variant(**{"name": "direct", "predicted_gain": 5.0, **self.fields})]


class GainIsText(_WrongField):
    fields = {"predicted_gain": "large"}


class GainIsNoNumber(_WrongField):
    fields = {"predicted_gain": float("nan")}


class ParameterIsNoNumber(_WrongField):
    fields = {"params": {"scale": float("nan")}}


class NameIsUnprintable(_WrongField):
    """Would move the cursor of whoever prints a receipt."""

    fields = {"name": "direct\x1b[2J"}


class NameIsEmpty(_WrongField):
    fields = {"name": ""}


class SetupIsNone(_WrongField):
    fields = {"setup_seconds": None}


class LevelIsUnknown(_WrongField):
    fields = {"level": "fast"}


class NameIsNumber(_WrongField):
    fields = {"name": 5}


class SitesAreText(_WrongField):
    fields = {"sites": "slow"}


class DtypeIsNickname(_WrongField):
    fields = {"compute_dtype": "bf16"}


class ProposesTensor(DirectScale):
    """Parameters that no recipe could hold."""

    def propose(self, observation, hardware):
        return [Variant("direct", params={"weights": torch.ones(3)}, predicted_gain=5.0)]


class Slower(DirectScale):
    def replacement(self):
        def forward(self, x):
            for _ in range(4 * self.rounds):
                x = x.neg().neg()
            return fast_forward(self, x)

        return forward


class OutOfMemory(DirectScale):
    def replacement(self):
        def forward(self, x):
            raise torch.OutOfMemoryError("tried to allocate 900 GiB")

        return forward


class HostMemory(DirectScale):
    def replacement(self):
        def forward(self, x):
            raise MemoryError("no memory")

        return forward
