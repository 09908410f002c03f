"""Calls that a committed plan does not serve: the original forward runs and the reason is counted."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch

import kpt
import mixed_models
import slow_models
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction.copies import HANDLE
from slow_models import DirectScale, Many, net, plugin

PLUGINS = [plugin(DirectScale)]


def ready(**options: object) -> tuple[slow_models.Net, torch.Tensor]:
    model, example = net(), torch.randn(32, 16)
    optimized(model, example, plugins=PLUGINS, **options)
    return model, example


def test_positional_and_keyword_calls_are_one():
    model, example = Many().eval(), torch.randn(32, 16)
    optimized(model, (example, {"bias": torch.randn(4)}), plugins=PLUGINS)
    bias = torch.randn(4)
    with torch.no_grad():
        first = model(example, {"bias": bias})
        assert torch.equal(first, model(x=example, extra={"bias": bias}))
        assert torch.equal(first, model(example, extra={"bias": bias}))
    assert fast_calls(model) == 3
    with torch.no_grad():
        model(example)
        model(example, {"bias": bias}, 2.0)
        output = model(example, {"bias": bias}, flag=True)
    assert isinstance(output, tuple)
    assert fast_calls(model) == 3 and sum(fallbacks(model).values()) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.double(), "dtype of 'x' is torch.float64; proven for torch.float32"),
        (lambda x: x[0], "rank of 'x' is 1; proven for 2"),
        (lambda x: x[:7], "dimension 0 of 'x' is 7; proven for 32"),
        (lambda x: x.t().contiguous().t(), "contiguous"),
        (lambda x: torch.nn.Buffer(x), None),
    ],
)
def test_other_inputs_run_the_original_forward_and_are_counted(change, reason):
    scale, example = slow_models.SlowScale().eval(), torch.randn(32, 16)
    optimized(scale, example, plugins=PLUGINS)
    given = change(example)
    with torch.no_grad():
        assert torch.equal(scale(given), slow_models.fast_forward(scale, given))
    if reason is None:
        assert sum(fallbacks(scale).values()) + fast_calls(scale) == 1
        return
    assert fast_calls(scale) == 0
    (found,) = fallbacks(scale)
    assert reason in found


class Summing(torch.nn.Module):
    """A forward whose result depends on what kind of container it is given, and on one that is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, more: object = None):
        y = self.net(x)
        return (y, more) if more is not None and isinstance(more, (list, dict)) else y


@pytest.mark.parametrize("given", [[], {}, {"a": []}])
def test_an_empty_container_is_no_argument_left_out(given):
    model, example = Summing().eval(), torch.randn(32, 16)
    optimized(model, example, plugins=PLUGINS)
    with torch.no_grad():
        assert isinstance(model(example, more=given), tuple)
    assert fast_calls(model) == 0
    assert fallbacks(model) == {"argument 'more' is of another structure than proven": 1}


def test_a_list_is_no_tuple():
    model, example = Summing().eval(), torch.randn(32, 16)
    optimized(model, (example, (torch.ones(2),)), plugins=PLUGINS)
    with torch.no_grad():
        assert isinstance(model(example, (torch.ones(2),)), torch.Tensor)
        assert isinstance(model(example, [torch.ones(2)]), tuple)
    assert fast_calls(model) == 1
    assert fallbacks(model) == {"argument 'more' is of another structure than proven": 1}


def test_declared_sizes_are_served():
    model, _ = ready(dynamic_shapes={"x": {0: "batch"}})
    with torch.no_grad():
        for size in (2, 3, 5, 31, 64):
            x = torch.randn(size, 16)
            assert torch.equal(model(x), net()(x))
    assert fast_calls(model) == 5


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2, 3), {}), ((), {"y": 1}), ((torch.ones(1, 16),), {"x": torch.ones(1, 16)})],
)
def test_wrong_calls_raise_what_python_raises(args, kwargs):
    model, example = ready()
    with pytest.raises(TypeError) as expected:
        net()(*args, **kwargs)
    with pytest.raises(TypeError) as found:
        model(*args, **kwargs)
    assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError):
        model(torch.randn(32, 9))
    assert torch.equal(model(example), net()(example))


def test_autocast_and_deterministic_mode_are_part_of_the_guard():
    model, example = ready()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(example)
        assert torch.equal(found, net()(example)) and found.dtype == torch.bfloat16
    torch.use_deterministic_algorithms(True)
    try:
        model(example)
    finally:
        torch.use_deterministic_algorithms(False)
    assert fast_calls(model) == 0
    assert fallbacks(model) == {
        "autocast differs from when the model was optimised": 1,
        "torch's deterministic mode differs from when the model was optimised": 1,
    }


def test_a_default_device_is_part_of_the_guard_and_no_obstacle():
    example = torch.randn(32, 16)
    torch.set_default_device("cpu")
    try:
        model = optimized(net(), example, plugins=PLUGINS)
        waiting = kpt.optimize(net(), plugins=PLUGINS, cache=False, budget=20)
        with torch.no_grad():
            assert torch.equal(model(example), net()(example))
            waiting(example)
            with torch.device("meta"):
                model(example)
    finally:
        torch.set_default_device(None)
    with torch.no_grad():
        model(example)
    assert fast_calls(model) == 1 and kpt.report(waiting).optimized
    assert fallbacks(model) == {"the default device differs from when the model was optimised": 2}


def test_a_model_optimised_under_autocast_is_served_under_autocast():
    model, example = net(), torch.randn(32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        optimized(model, example, plugins=PLUGINS)
        with torch.no_grad():
            assert model(example).dtype == torch.bfloat16
    assert fast_calls(model) == 1
    assert model(example).dtype == torch.float32
    assert fast_calls(model) == 1


def test_tracing_compiling_and_exporting_see_the_original_model():
    model, example = ready()
    expected = net()(example)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(example), expected)
    exported = torch.export.export(model, (example,))
    torch.testing.assert_close(exported.module()(example), expected)
    traced = torch.jit.trace(model, example, check_trace=False)
    torch.testing.assert_close(traced(example), expected)
    assert torch.equal(model(example), expected)


def test_eight_threads():
    model, example = ready(dynamic_shapes={"x": {0: "batch"}})
    inputs = [torch.randn(4 + i, 16) for i in range(8)]
    expected = [net()(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and fast_calls(model) == 400


def test_a_call_that_compiled_code_refused_is_no_call_that_another_thread_ran():
    model, example = mixed_models.Mixed().eval(), torch.randn(32, 64)
    optimized(model, example, plugins=[plugin(mixed_models.Compiled)])
    plan = model.__dict__[HANDLE].plan
    compiled, plan.direct, plan._repeated = plan.direct, None, None
    assert compiled is not None

    def refused(*args, **kwargs):
        thread = threading.Thread(target=torch.no_grad()(compiled.__call__), args=args, kwargs=kwargs)
        thread.start()
        thread.join(60)
        return plan.original(model)(*args, **kwargs)

    plan.run = refused
    before = compiled.executions
    with torch.no_grad():
        model(example)
    assert compiled.executions == before + 1
    assert fast_calls(model) == 0
    assert fallbacks(model) == {"the compiled code's own guard refused the call": 1}


class Signed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, by: float = 1.0, more: list | None = None):
        return self.net(x) * torch.tensor(by if more is None else more[0]).signbit().logical_not().mul(2).sub(
            1
        )


@pytest.mark.parametrize("write", [lambda v: {"by": v}, lambda v: {"more": [v]}])
def test_zero_is_not_minus_zero(write):
    model, example = Signed().eval(), torch.randn(32, 16)
    optimized(model, ({"x": example, **write(0.0)}), plugins=PLUGINS)
    with torch.no_grad():
        assert torch.equal(model(example, **write(-0.0)), -model(example, **write(0.0)))
    assert fast_calls(model) == 1
    (reason,) = fallbacks(model)
    assert "is -0.0; proven for 0.0" in reason


class Shifted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, by: complex = 1j) -> torch.Tensor:
        return self.net(x) * by.imag + math.copysign(1.0, by.real)


@pytest.mark.parametrize("other", [complex(0.0, -1.0), complex(-0.0, 1.0), 1])
def test_complex_numbers_are_told_apart_by_their_signs_too(other):
    model, example, by = Shifted().eval(), torch.randn(32, 16), complex(0.0, 1.0)
    twin = copy.deepcopy(model)
    optimized(model, {"x": example, "by": by}, plugins=PLUGINS)
    with torch.no_grad():
        model(example, by=by)
        assert torch.equal(model(example, by=other), twin(example, by=other))
    assert fast_calls(model) == 1
