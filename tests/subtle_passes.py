"""Passes that take `slow_models.SlowScale`'s detour out, and are wrong where few would look."""

from __future__ import annotations

import math
import random
import types
from typing import Any, ClassVar

import numpy
import torch

import kpt
from kpt.compiling import CompiledForward
from kpt.specs import Variant
from slow_models import DerivedScale, DirectScale, SlowScale, fast_forward, plugin


def rule_of(model: torch.nn.Module, offered: type, *example: torch.Tensor, phase: str = "layout") -> str:
    """The rule that rejects ``offered``, or "kept"."""
    kpt.optimize(model, example, plugins=[plugin(offered, phase=phase)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    return "kept" if receipt.optimized else receipt.rejected[0].rule


class RootWrapper(DirectScale):
    """Wraps the root's forward with `around`."""

    def around(self, inner: Any, x: torch.Tensor) -> Any:
        return inner(x)

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        inner = model.forward
        model.forward = types.MethodType(lambda _, x: self.around(inner, x), model)

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back


class Captured(DirectScale):
    """Right, and captures the whole forward: attributes become constants."""

    backend = "eager"

    def apply(self, model, variant):
        undo = super().apply(model, variant)
        self.compiled = model.forward = CompiledForward(model.forward, backend=self.backend)

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back

    def verify_applied(self, model):
        return self.compiled.executions > 0


class CapturedAsFunction(Captured):
    """Writes of the forward come after all reads, as compilers do it."""

    backend = "aot_eager"


class WritesItsInput(torch.nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.slow = SlowScale(width)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        b.add_(1.0)
        return self.slow(a) * b


class RightForSixteenRows(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * (1.0 if len(x) == 16 else 1.3)


class LeavesOut(DirectScale):
    """Calls the model with ones in place of the argument ``mask``."""

    def apply(self, model, variant):
        undo, inner = super().apply(model, variant), model.forward
        model.forward = lambda **named: inner(**{**named, "mask": torch.ones_like(named["mask"])})

        def take_back():
            model.__dict__.pop("forward", None)
            undo()

        return take_back


class ThirtyPercent(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.3


class FourPercentInFp8(DirectScale):
    """Off by less than 5 %, and says that it computes in a dtype that no eager model runs in."""

    variant = Variant("fp8", predicted_gain=5.0, sites=(), compute_dtype="float8_e4m3fn")

    def replacement(self):
        return lambda self, x: fast_forward(self, x) * 1.04


class ColumnMajor(DirectScale):
    """Reads the storage as if rows were adjacent."""

    def replacement(self):
        return lambda self, x: fast_forward(self, x.as_strided(x.shape, (1, x.shape[0]), x.storage_offset()))


class WrongForLongSequences(DirectScale):
    def replacement(self):
        return lambda self, x: fast_forward(self, x) * (1.3 if x.shape[1] > 40 else 1.0)


class LosesInputGradient(RootWrapper):
    """Every parameter's gradient is right; whatever computed the input is never trained."""

    def around(self, inner, x):
        return inner(x.detach())


class DetachesLogits(RootWrapper):
    """The loss is trained as ever; a loss of the user's own, made from the logits, is not."""

    def around(self, inner, x):
        output = inner(x)
        return {**output, "logits": output["logits"].detach()}


class _Around(torch.nn.Module):
    """A model around a `SlowScale`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.slow = SlowScale(width)


class NoisySlow(_Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + torch.randn_like(x)


class Masked(_Around):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        result = self.slow(x) * scale
        return result if mask is None else result * mask


class Boxes:
    """What a detector returns: no tensor, and no comparison of its own."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores


class Handover(_Around):
    """Returns what ``way`` makes of the result."""

    def __init__(self, way: str, width: int = 16) -> None:
        super().__init__(width)
        self.way = way

    def forward(self, x: torch.Tensor) -> Any:
        return self.ways[self.way](self.slow(x).detach())

    ways: ClassVar[dict[str, Any]] = {
        "an array": lambda result: {"scores": result.numpy()},
        "a number of NumPy's": lambda result: [result.sum().numpy()[()]],
        "an object": lambda result: Boxes(result.flatten().tolist()),
        "a generator": lambda result: (row for row in result),
        "a coroutine": lambda result: Handover.later(result),
    }

    @staticmethod
    async def later(result: torch.Tensor) -> torch.Tensor:
        return result


class PythonsNoise(_Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * random.random() + float(numpy.random.rand())


class AsksForItsDtype(_Around):
    """In fp64, it computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * (2.0 if x.dtype == torch.float64 else 1.0)


class WithLoss(_Around):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.slow(x)
        return {"loss": logits.pow(2).mean(), "logits": logits * 2}


class ComplexSlow(_Around):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.weight = torch.nn.Parameter(torch.randn(width, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(self.slow(x.real), x.imag) * self.weight


class WritesLate(DirectScale):
    """Right as long as it is judged, and writes to a weight once it serves."""

    serves = False

    def replacement(self):
        def forward(self, x):
            if WritesLate.serves:
                self.weight.data.mul_(1.01)
            return fast_forward(self, x)

        return forward


# -- configurations and attributes that functions read


class Config:
    def __init__(self) -> None:
        self.gain = 2.0
        self.inner = types.SimpleNamespace(names=["a"], flag=True)


class Configured(_Around):
    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.settings = Config()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * self.settings.gain


def scaled_by(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * module.gain


class ScaledByAFunction(_Around):
    """Its own code names no attribute."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.gain = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_by(self, self.slow(x))


class CountsInAnObject(_Around):
    """Counts its calls where every copy of the model counts too."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.statistics = types.SimpleNamespace(calls=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.statistics.calls += 1
        return self.slow(x)


class EditsConfig(DirectScale):
    """Changes the configuration that its workspace shares with the user's model."""

    def apply(self, model, variant):
        model.settings.gain = 2.0
        model.settings.fused = True
        model.settings.inner.names.append("b")
        model.settings.inner.flag = False
        return super().apply(model, variant)


class SlottedConfig:
    """Has no dictionary; one slot is private."""

    __slots__ = ("__gain", "calls", "names")

    def __init__(self) -> None:
        self.__gain = 2.0
        self.calls = 0
        self.names = ["a"]

    @property
    def gain(self) -> float:
        return self.__gain

    def amplify(self, gain: float) -> None:
        self.__gain = gain


class Slotted(_Around):
    """Keeps a constant and its settings, which count its calls, in slots."""

    __slots__ = ("factor", "settings")

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.factor = 0.0
        self.settings = SlottedConfig()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.settings.calls += 1
        return self.slow(x) * self.settings.gain + math.copysign(1.0 + self.factor, self.factor)


class EditsSlots(DirectScale):
    def apply(self, model, variant):
        model.settings.amplify(3.0)
        model.settings.names.append("b")
        return super().apply(model, variant)


# -- copies that nobody was told of, results that are remembered


class SaysNothingOfCopies(DerivedScale):
    """Holds copies of weights and does not say so."""

    variant = Variant("lies", predicted_gain=5.0, sites=())


class HidesCopies(SaysNothingOfCopies):
    """As above, where only the function itself can see them."""

    def apply(self, model, variant):
        copies = [(model.slow.weight.clone(), model.slow.bias.clone())]
        model.slow.forward = lambda x: torch.addcmul(copies[0][1], x, copies[0][0])
        self.applied = 1
        return lambda: model.slow.__dict__.pop("forward", None)


class _Slotted:
    __slots__ = ("__weight",)

    def __init__(self, weight: Any) -> None:
        self.__weight = weight

    def __call__(self) -> Any:
        return self.__weight


class CopiesInArrays(SaysNothingOfCopies):
    """In NumPy's memory, in a private slot and in a default."""

    def apply(self, model, variant):
        held = _Slotted(model.slow.weight.detach().numpy().copy())

        copied = model.slow.bias.detach().numpy().copy()

        def forward(x, *, bias=copied):
            return torch.addcmul(torch.from_numpy(bias), x, torch.from_numpy(held()))

        model.slow.forward = forward
        self.applied = 1
        return lambda: model.slow.__dict__.pop("forward", None)


class LiveArrays(DirectScale):
    """NumPy's views of the live weights are no copies."""

    def apply(self, model, variant):
        weight, bias = model.slow.weight.detach().numpy(), model.slow.bias.detach().numpy()
        model.slow.forward = lambda x: torch.addcmul(torch.from_numpy(bias), x, torch.from_numpy(weight))
        self.applied = 1
        return lambda: model.slow.__dict__.pop("forward", None)


class Remembers(RootWrapper):
    """Looks a result up by the tensor that it was asked for."""

    def __init__(self):
        self.known = {}

    def around(self, inner, x):
        key = (id(x), x.data_ptr())
        if key not in self.known:
            self.known[key] = (x, inner(x))
        return self.known[key][1].clone()


class RemembersMemory(RootWrapper):
    """Looks a result up by what another tensor in the same memory has, too.

    It holds what it was given, so that no draw gets that memory by accident.
    """

    def __init__(self):
        self.known = {}

    def around(self, inner, x):
        key = (x.data_ptr(), x._version, x.shape)
        if key not in self.known:
            self.known[key] = (x, inner(x))
        return self.known[key][1].clone()


class RingOfBuffers(RootWrapper):
    """Right until the eighth call after it, which overwrites the result."""

    def __init__(self):
        self.calls = 0
        self.buffers = {}

    def around(self, inner, x):
        result = inner(x)
        self.calls += 1
        ring = self.buffers.setdefault(result.shape, [torch.empty_like(result) for _ in range(8)])
        return ring[self.calls % 8].copy_(result)


class KeepsResults(RootWrapper):
    """Answers with the very tensor again that an earlier caller may have written to."""

    def __init__(self):
        self.known = {}

    def around(self, inner, x):
        key = x.numpy().tobytes()
        if key not in self.known:
            self.known = {key: inner(x)}
        return self.known[key]


class OwnTensors(torch.Tensor):
    pass


class ReturnsASubclass(RootWrapper):
    def around(self, inner, x):
        return inner(x).as_subclass(OwnTensors)


class ReturnsInferenceTensors(RootWrapper):
    """No layer that is trained can take these."""

    def around(self, inner, x):
        with torch.inference_mode():
            return inner(x)


class WrongInInferenceMode(RootWrapper):
    def around(self, inner, x):
        return inner(x) * (1.01 if torch.is_inference_mode_enabled() else 1.0)


class AsksForTheVersion(RootWrapper):
    """Tensors made in inference mode have none, and raise."""

    def around(self, inner, x):
        self.version = x._version
        return inner(x)


class WrongForOddAddresses(RootWrapper):
    """As a kernel is that loads sixteen bytes at a time."""

    def around(self, inner, x):
        return inner(x) * (1.01 if x.data_ptr() % 16 else 1.0)


class KeepsHistory(RootWrapper):
    """Records gradients although the caller turned them off."""

    def around(self, inner, x):
        with torch.enable_grad():
            return inner(x)


class Transposes(DirectScale):
    """Right values in an order of memory that `view` refuses."""

    def replacement(self):
        return lambda self, x: fast_forward(self, x).t().contiguous().t()
