"""Hooks and forwards of others, before ours, around it or in its place: none is lost, none keeps ours."""

from __future__ import annotations

import functools
import gc
import types

import pytest
import torch

import fingerprints
import kpt
import slow_models
from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction import dispatch
from slow_models import DirectScale, Many, net, plugin

PLUGINS = [plugin(DirectScale)]
#: Who keeps a forward is found in everything that is in memory.
pytestmark = pytest.mark.usefixtures("whole_heap")


def ready(**options: object) -> tuple[slow_models.Net, torch.Tensor]:
    model, example = net(), torch.randn(32, 16)
    optimized(model, example, plugins=PLUGINS, **options)
    return model, example


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
