"""A block leaves no trace in global state, and a trial none in the model."""

from __future__ import annotations

import gc
import io
import os
import random
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kpt.globalstate import seed_torch
from kpt.judge.bitwise import bitwise_equal
from kpt.judge.codestate import CodeState
from kpt.judge.poison import PoisonMode
from kpt.judge.state import ModelState, Snapshot, untouched


def numpy_draw() -> None:
    import numpy

    numpy.random.rand()


def mixed_precision_flags() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # the new way, after which the old getter raises


def dynamo_config() -> None:
    import torch._dynamo.config as config

    config.cache_size_limit = 99


DISTURBANCES: dict[str, Callable[[], Any]] = {
    "random state of Python": random.random,
    "random state of NumPy": numpy_draw,
    "random state of torch": lambda: torch.rand(3),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "gradient mode": lambda: torch.set_grad_enabled(False),
    "autocast of cpu": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast dtype of cpu": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast cache": lambda: torch.set_autocast_cache_enabled(False),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "fill of uninitialised memory": lambda: setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    ),
    "float32 matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32 precision of mkldnn matmul": mixed_precision_flags,
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "mkldnn.enabled": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "cudnn.benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "flash_sdp_enabled": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch._dynamo.config": dynamo_config,
    "torch function modes": lambda: TorchFunctionMode().__enter__(),
    "torch dispatch modes": lambda: PoisonMode().__enter__(),
    "anomaly detection": lambda: torch.set_anomaly_enabled(True),
    "garbage collector": gc.disable,
    "handler of SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "warning filters": lambda: warnings.simplefilter("error"),
    "environment": lambda: os.environ.update(KPT_TEST_VARIABLE="1", PATH=""),
    "working directory": lambda: os.chdir("/"),
    "standard output": lambda: setattr(sys, "stdout", io.StringIO()),
    "standard error": lambda: setattr(sys, "stderr", io.StringIO()),
    "standard input": lambda: setattr(sys, "stdin", io.StringIO()),
    "hook of uncaught errors": lambda: setattr(sys, "excepthook", print),
    "hook of uncaught errors in threads": lambda: setattr(threading, "excepthook", print),
    "profile function": lambda: sys.setprofile(lambda *event: None),
    "trace function": lambda: sys.settrace(lambda *event: None),
    "arguments of the program": lambda: sys.argv.append("--more"),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_each_disturbance_is_undone_and_named(name: str) -> None:
    import numpy  # noqa: F401
    import torch._dynamo.config  # noqa: F401

    before = Snapshot()
    with untouched() as changes:
        DISTURBANCES[name]()
        assert before.differences()
    assert name in changes.names
    assert changes.stuck == []
    assert before.differences() == []


def test_nothing_is_reported_where_nothing_changed() -> None:
    with untouched() as changes:
        pass
    assert (changes.names, changes.stuck) == ([], [])


def test_random_numbers_continue_as_if_nothing_had_happened() -> None:
    torch.manual_seed(1)
    expected = torch.rand(5)
    torch.manual_seed(1)
    with untouched():
        torch.manual_seed(7)
        torch.rand(100)
    assert torch.equal(torch.rand(5), expected)


def test_state_is_put_back_after_a_failure_too() -> None:
    before = Snapshot()
    with pytest.raises(KeyboardInterrupt), untouched():
        for disturb in DISTURBANCES.values():
            disturb()
        raise KeyboardInterrupt
    assert before.differences() == []


def test_an_inference_mode_left_on_is_reported() -> None:
    guard = torch.inference_mode()
    with untouched() as changes:
        guard.__enter__()
    guard.__exit__(None, None, None)
    assert "inference mode" in changes.stuck


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)
        self.last.weight = self.first.weight  # tied
        self.cache = {"table": torch.ones(2), "steps": 0}
        self.frequencies = torch.ones(3)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model()
    made(torch.randn(5, 4)).sum().backward()
    with torch.no_grad():  # a NaN with a payload has to survive
        made.first.bias.view(torch.int32)[0] = 0x7FC12345
    return made


def in_place(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1.0)


def payload(model: Model) -> None:
    with torch.no_grad():
        model.first.bias.view(torch.int32)[0] = 0x7FC00000


def drop_gradient(model: Model) -> None:
    model.first.weight.grad = None


def recast(model: Model) -> None:
    model.norm.weight.data = model.norm.weight.data.double()


def untie(model: Model) -> None:
    model.last.weight = nn.Parameter(model.last.weight.detach().clone())


def set_forward(model: Model) -> None:
    model.first.forward = lambda x: x  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Model], Any]] = {
    "first.weight: values": lambda m: in_place(m.first.weight),
    "first.bias: values": payload,
    "norm.running_mean: values": lambda m: m(torch.randn(3, 4)),
    "norm.num_batches_tracked: values": lambda m: m(torch.randn(3, 4)),
    "frequencies: values": lambda m: m.frequencies.mul_(2),
    "cache['table']: values": lambda m: m.cache["table"].mul_(2),  # type: ignore[union-attr]
    "norm.weight: memory, dtype, shape or strides": recast,
    "first.weight: gradient values": lambda m: m.first.weight.grad.add_(1),  # type: ignore[union-attr]
    "first.weight: gradient removed": drop_gradient,
    "norm.bias: requires_grad": lambda m: m.norm.bias.requires_grad_(False),
    "last: parameter 'weight' replaced": untie,
    "norm: attribute 'training' replaced": lambda m: m.norm.eval(),
    "first: attribute 'forward' added": set_forward,
    "model: attribute 'cache' changed inside": lambda m: m.cache.update(steps=1),
    "model: attribute 'calls' changed inside": lambda m: m.calls.append(1),
    "model: attribute 'frequencies' removed": lambda m: delattr(m, "frequencies"),
    "norm: attribute 'eps' replaced": lambda m: setattr(m.norm, "eps", 1.0),
    "first: hooks '_forward_hooks' changed inside": lambda m: m.first.register_forward_hook(print),
    "model: module 'norm' replaced": lambda m: setattr(m, "norm", nn.Identity()),
    "norm: replaced or removed": lambda m: setattr(m, "norm", nn.Identity()),
    "extra: added": lambda m: m.add_module("extra", nn.Identity()),
    "norm: buffer 'more' added": lambda m: m.norm.register_buffer("more", torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_of_a_model_is_named_and_undone(name: str, model: Model) -> None:
    state = ModelState(model)
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    gradient = model.first.weight.grad
    CHANGES[name](model)
    assert name in state.differences()
    assert state.restore() == []
    assert state.exact and state.differences() == []
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert model.first.weight.grad is gradient
    assert model.first.weight is model.last.weight


def test_an_unchanged_model_has_no_differences_and_its_versions_stay(model: Model) -> None:
    state = ModelState(model)
    versions = [tensor._version for tensor in model.parameters()]
    assert state.restore() == []
    assert [tensor._version for tensor in model.parameters()] == versions


def test_changes_that_bypass_version_counters_are_found(model: Model) -> None:
    state = ModelState(model)
    model.first.weight.data.mul_(1.0000001)
    assert "first.weight: values" in state.differences()


def test_a_training_step_is_undone_bit_for_bit(model: Model) -> None:
    state = ModelState(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert state.restore() == []
    for name, tensor in model.state_dict().items():
        assert bitwise_equal(tensor, before[name]), name


def test_beyond_the_limit_changes_are_found_and_said_to_stay(model: Model) -> None:
    state = ModelState(model, limit_bytes=64)
    assert not state.exact and "first.weight" in state.unrestorable
    assert state.differences() == []
    in_place(model.first.weight)
    assert "first.weight: values" in state.differences()
    assert "first.weight: values" in state.restore()
    model.frequencies.add_(1)
    assert "frequencies: values" not in state.restore()


def test_checksums_depend_on_position_and_every_bit() -> None:
    from kpt.judge.tensorstate import checksum

    x = torch.randn(100)
    for index in (0, 50, 99):
        other = x.clone()
        other.view(torch.int32)[index] ^= 1
        assert checksum(other) != checksum(x)
    assert checksum(x.flip(0)) != checksum(x)
    assert checksum(x.clone()) == checksum(x)
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))
    assert isinstance(checksum(torch.ones(2, dtype=torch.bool)), int)


def test_odd_models_are_remembered() -> None:
    model = nn.Module()
    model.lazy = nn.LazyLinear(3)
    model.meta = nn.Linear(2, 2, device="meta")
    model.lock = threading.Lock()  # type: ignore[assignment]
    model.register_parameter("none", None)
    model.scalar = nn.Parameter(torch.tensor(1.0))
    model.complex = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.helper = types.SimpleNamespace(_parameters=[], _modules={})  # type: ignore[assignment]
    state = ModelState(model)
    assert state.differences() == []
    model.helper._parameters.append(1)
    assert state.differences() == ["model.helper: attribute '_parameters' changed inside"]
    assert state.restore() == []
    in_place(model.complex)
    assert state.differences() == ["complex: values"]
    assert state.restore() == []


def test_the_first_import_of_dynamo_is_no_change_of_code() -> None:
    """It exchanges `torch.manual_seed`, and may be that of whoever compiles first."""
    script = (
        "import torch; from kpt.judge.codestate import CodeState; state = CodeState(torch.nn.Linear(2, 2)); "
        "import torch._dynamo; assert state.differences() == [], state.differences()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()


def test_what_the_compiler_takes_away_of_a_model_that_died_is_no_change_of_code() -> None:
    """A user's compiled model may be collected during a trial, whose plan was rejected for it."""
    compiled = torch.compile(Broken(), backend="eager")
    compiled(torch.ones(2))
    made = {name: f for name, f in globals().items() if name.startswith(("__compiled_fn", "__resume_at"))}
    assert made
    state = CodeState(Broken())
    for name in made:  # what its finalizer does, at a time that is not ours to choose
        del globals()[name]
    found = state.differences()
    globals().update(made)
    assert found == []


def test_a_seed_is_left_for_no_device_that_is_used_later() -> None:
    """The user's own would be replaced where a GPU is first used after a search."""
    if torch.cuda.is_initialized():
        pytest.skip("the device is in use already")
    torch.manual_seed(5)
    waiting = torch.cuda._lazy_seed_tracker.get_calls()
    before = torch.get_rng_state()
    seed_torch(7)
    drawn = torch.rand(3)
    seed_torch(7)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.cuda._lazy_seed_tracker.get_calls() == waiting and waiting
    torch.set_rng_state(before)


class Drawing(nn.Module):
    def __init__(self) -> None:
        import numpy

        super().__init__()
        self.torchs = torch.Generator().manual_seed(0)
        self.several = [random.Random(0), torch.Generator().manual_seed(1)]
        self.by_name = {"new": numpy.random.default_rng(0), "old": numpy.random.RandomState(0)}
        self.arrays = numpy.random.Generator(numpy.random.MT19937(0))

    def forward(self) -> list[float]:
        return [
            float(torch.rand((), generator=self.torchs)),
            self.several[0].random(),
            float(torch.rand((), generator=self.several[1])),
            self.by_name["new"].random(),
            self.by_name["old"].random_sample(),
            self.arrays.random(),
        ]


def test_random_generators_that_a_model_holds_draw_again_what_they_drew() -> None:
    model = Drawing()
    model()
    state = ModelState(model)
    drawn = model()
    assert set(state.tensor_differences()) == {
        f"model.{name}: drawn from" for name in ("torchs", "several", "by_name", "arrays")
    }
    assert state.restore() == []
    assert model() == drawn
