"""Calls that a committed plan does not serve: the original forward runs and the reason is counted."""

from __future__ import annotations

import copy
import functools
import gc
import math
import threading
import types

import pytest
import torch

import fingerprints
import kpt
import mixed_models
import slow_models
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction import dispatch
from kpt.transaction.copies import HANDLE
from slow_models import DirectScale, net, plugin

PLUGINS = [plugin(DirectScale)]


def ready(**options: object) -> tuple[slow_models.Net, torch.Tensor]:
    model, example = net(), torch.randn(32, 16)
    optimized(model, example, plugins=PLUGINS, **options)
    return model, example


class Many(torch.nn.Module):
    """A forward with optional arguments, nested inputs and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, extra: dict | None = None, scale: float = 1.0, flag: bool = False):
        y = self.net(x) * scale
        if extra is not None:
            y = y + extra["bias"]
        return (y, x) if flag else y


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
    compiled, plan.direct = plan.direct, None
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


class Divided(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, by: float = 1.0, more: list | None = None):
        return self.net(x) / torch.tensor(by if more is None else more[0])


@pytest.mark.parametrize("write", [lambda v: {"by": v}, lambda v: {"more": [v]}])
def test_zero_is_not_minus_zero(write):
    model, example = Divided().eval(), torch.randn(32, 16)
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


def test_hooks_that_are_there_before_are_respected_or_refused_by_name():
    model, example = net(), torch.randn(32, 16)
    seen = []
    model.register_forward_hook(lambda *args: seen.append("root"))
    optimized(model, example, plugins=PLUGINS)
    assert seen == []
    model(example)
    assert seen == ["root"] and fast_calls(model) == 1
    inner = net()
    handle = inner.slow.register_forward_hook(lambda *args: seen.append("inner"))
    kpt.optimize(inner, example, plugins=PLUGINS, budget=20.0)
    receipt = kpt.report(inner)
    assert not receipt.optimized and "slow has a hook (forward_hooks)" in receipt.reason
    inner(example)
    assert seen == ["root", "inner"]
    handle.remove()
    optimized(inner, example, plugins=PLUGINS)


def test_a_hook_that_comes_later_fires():
    model, example = ready()
    seen = []
    handle = model.slow.register_forward_pre_hook(lambda *args: seen.append(1))
    model(example)
    assert seen == [1] and fallbacks(model) == {"a hook was registered on slow": 1}
    handle.remove()
    model(example)
    assert seen == [1]
    kpt.refresh(model)
    model(example)
    assert fast_calls(model) == 1


def test_a_parent_absorbs_an_optimised_child():
    torch.manual_seed(0)
    parent, example = Many().eval(), torch.randn(32, 16)
    expected = parent(example)
    optimized(parent.net, example, plugins=PLUGINS)
    optimized(parent, example, plugins=PLUGINS)
    assert torch.equal(parent(example), expected) and fast_calls(parent) == 1
    assert "forward" not in vars(parent.net)
    kpt.restore(parent)
    assert fingerprints.ours(parent) == []


def test_optimising_twice_and_restoring_twice():
    model, example = net(), torch.randn(32, 16)
    before = fingerprints.of_model(model)
    optimized(model, example, plugins=PLUGINS)
    optimized(model, example, plugins=PLUGINS)
    model(example)
    assert fast_calls(model) == 1
    for _ in range(2):
        assert kpt.restore(model) is model
        assert fingerprints.differences(before, fingerprints.of_model(model)) == []
    assert kpt.report(model).status == "restored" and not kpt.report(model).optimized
    assert kpt.restore(net()) is not None


def test_a_forward_that_the_user_replaced_is_the_original():
    model, example = net(), torch.randn(32, 16)
    own = types.MethodType(lambda self, x: type(self).forward(self, x) + 1.0, model)
    model.forward = own
    expected = model(example)
    optimized(model, example, plugins=PLUGINS)
    assert torch.equal(model(example), expected) and fast_calls(model) == 1
    kpt.restore(model)
    assert model.forward is own


def test_a_wrapper_that_comes_later_survives_restore():
    model, example = ready()
    before, calls = net()(example), []

    @functools.wraps(model.forward)
    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    inner = model.forward
    model.forward = wrapper
    del wrapper
    assert torch.equal(model(example), before) and fast_calls(model) == 1
    kpt.restore(model)
    assert torch.equal(model(example), before) and calls == [1, 1]
    assert not _reaches_ours(model.forward)


def test_a_wrapper_bound_to_the_model_is_not_taken_for_ours():
    model, example = ready()
    inner = model.forward

    @functools.wraps(inner.__func__)
    def wrapper(self, *args, **kwargs):
        return inner(*args, **kwargs) + 1.0

    model.forward = types.MethodType(wrapper, model)
    expected = net()(example) + 1.0
    assert torch.equal(model(example), expected)
    kpt.restore(model)
    assert torch.equal(model(example), expected) and not _reaches_ours(model.forward)
    optimized(model, example, plugins=PLUGINS)
    assert torch.equal(model(example), expected) and fast_calls(model) == 1


def _reaches_ours(function) -> bool:
    seen, pending = set(), [function]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if fingerprints._is_ours(item):
            return True
        item = getattr(item, "__func__", item)
        cells = [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
        held = [getattr(item, "__wrapped__", None), getattr(item, "func", None), *cells]
        pending.extend(value for value in held if callable(value))
    return False


def test_accelerate_hooks_added_later():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Plus(ModelHook):
        def post_forward(self, module, output):
            return output + 1.0

    model, example = ready()
    before = net()(example)
    add_hook_to_module(model, Plus())
    assert torch.equal(model(example), before + 1.0) and fast_calls(model) == 1
    kpt.restore(model)
    assert torch.equal(model(example), before + 1.0)
    remove_hook_from_module(model)
    assert torch.equal(model(example), before) and fingerprints.ours(model) == []


def test_a_forward_put_in_place_of_ours_stays_and_is_optimised_in_turn():
    model, example = ready()
    model.forward = types.MethodType(lambda self, x: self.last(self.slow(x)) * 2.0, model)
    expected = model(example)
    mine = model.forward
    kpt.restore(model)
    assert model.forward is mine and torch.equal(model(example), expected)
    kpt.refresh(model)
    assert kpt.report(model).optimized
    assert torch.equal(model(example), expected) and fast_calls(model) == 1


class Keeper:
    """Keeps a forward among its attributes, or those of its class."""

    kept: object = None

    def __init__(self, inner=None):
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) + 1.0


class KeeperModule(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1.0


def _in_an_attribute(model, inner):
    return Keeper(inner)


def _in_a_bound_method(model, inner):
    return Keeper(inner).__call__


def _in_a_list_of_a_closure(model, inner):
    kept = [None, inner]
    return lambda x: kept[1](x) + 1.0


def _in_a_dictionary_of_the_model(model, inner):
    model.kept = {"inner": [inner]}
    return types.MethodType(lambda self, x: self.kept["inner"][0](x) + 1.0, model)


def _by_name_in_the_model(model, inner):
    model.kept = inner
    return types.MethodType(lambda self, x: vars(self)["kept"](x) + 1.0, model)


def _in_a_module(model, inner):
    module = KeeperModule(inner)
    return lambda x: module(x)


def _in_a_class(model, inner):
    Keeper.kept = inner
    return lambda x: Keeper.kept(x) + 1.0


def _in_a_default(model, inner):
    return lambda x, inner=inner: inner(x) + 1.0


def _in_a_keyword_default(model, inner):
    def wrapper(x, *, inner=inner):
        return inner(x) + 1.0

    return wrapper


def _in_a_partial_function(model, inner):
    return functools.partial(lambda call, x: call(x) + 1.0, inner)


def _twice(model, inner):
    """As a library does that keeps the forward on the model to put it back, and calls it from a closure."""
    model._old_forward = inner
    return lambda x: inner(x) + 1.0


def _in_a_global(model, inner):
    globals()["_before"] = inner
    return lambda x: _before(x) + 1.0  # noqa: F821 - as a notebook writes it


def _bound_anew(model, inner):
    again = types.MethodType(inner.__func__, model)
    return lambda x: again(x) + 1.0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        _in_an_attribute,
        _in_a_bound_method,
        _in_a_list_of_a_closure,
        _in_a_dictionary_of_the_model,
        _by_name_in_the_model,
        _in_a_module,
        _in_a_class,
        _in_a_default,
        _in_a_keyword_default,
        _in_a_partial_function,
        _twice,
        _in_a_global,
        _bound_anew,
    ],
)
def test_a_wrapper_is_unwound_wherever_it_keeps_what_it_wraps(wrap, own):
    model, example = net(), torch.randn(32, 16)
    if own:  # the forward that comes back is then not that of the class
        model.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2.0, model)
    optimized(model, example, plugins=PLUGINS)
    expected = model(example) + 1.0
    model.forward = wrap(model, model.forward)
    assert torch.equal(model(example), expected) and fast_calls(model) == 2
    kept = model.forward
    kpt.restore(model)
    assert model.forward is kept and torch.equal(model(example), expected)
    assert _holders_of_ours(model) == []


def test_who_kept_the_forward_gets_the_original_though_nobody_wrapped_it():
    model, example = net(), torch.randn(32, 16)
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 2.0, model)
    optimized(model, example, plugins=PLUGINS)
    kept = [model.forward]
    expected = kept[0](example)
    kpt.restore(model)
    assert kept == [model.forward] and torch.equal(kept[0](example), expected)


def _holders_of_ours(model) -> list[object]:
    """Bound methods of the dispatcher's code that are still somewhere in this process."""
    return [
        item
        for item in gc.get_objects()
        if type(item) is types.MethodType and item.__self__ is model and dispatch.is_dispatcher(item)
    ]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: lambda x, held=(inner,): held[0](x),
        lambda inner: functools.lru_cache(maxsize=None)(inner),
        lambda inner: lambda x, held=frozenset({inner}): next(iter(held))(x),
        lambda inner: types.SimpleNamespace(many={inner}, one=(1, inner)).one.__getitem__,
    ],
    ids=["tuple", "cache", "set", "method of a tuple"],
)
def test_a_wrapper_of_fixed_parts_is_refused_by_name(wrap):
    model, _ = ready()
    bound = model.forward
    model.forward = wrap(bound)
    with pytest.raises(RuntimeError, match="wraps the optimised forward and cannot be unwound"):
        kpt.restore(model)
    model.forward = bound
    del bound
    kpt.restore(model)
    assert fingerprints.ours(model) == []


def test_a_wrapper_that_cannot_be_unwound_is_named_and_nothing_is_lost():
    class Opaque:
        __slots__ = ("inner",)

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, example = ready()
    before, bound = net()(example), model.forward
    model.forward = Opaque(bound)
    with pytest.raises(RuntimeError, match="Opaque wraps the optimised forward"):
        kpt.restore(model)
    assert torch.equal(model(example), before) and fast_calls(model) == 1
    model.forward = bound
    kpt.restore(model)
    assert fingerprints.ours(model) == []
