"""Changes that a plan has to notice, and state that a copy cannot share."""

from __future__ import annotations

import copy
import dataclasses
import types

import pytest
import torch

import kpt
from slow_models import DerivedScale, DirectScale, SlowScale, net, plugin
from subtle_passes import Captured


def optimised(model, x, **options):
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False, **options)
    assert kpt.report(model).optimized, kpt.report(model)
    return model


def reasons(model):
    return kpt.report(model).calls["reasons"]


@pytest.mark.parametrize("offered", [DirectScale, DerivedScale], ids=["live", "derived"])
def test_weights_made_in_inference_mode_are_never_copied(offered):
    with torch.inference_mode():
        model = net()
    twin, x = copy.deepcopy(model), torch.randn(32, 16)
    kpt.optimize(model, x, plugins=[plugin(offered)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert receipt.optimized is (offered is DirectScale)
    if offered is DerivedScale:
        assert "first.weight was made in inference mode" in receipt.rejected[0].reason
    with torch.inference_mode():
        for each in (model, twin):
            each.slow.weight.mul_(2.0)
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("offered", [DirectScale, DerivedScale], ids=["live", "derived"])
def test_neither_are_plain_attributes_made_in_inference_mode(offered):
    """A table that a first call makes, say."""
    model = net()
    with torch.inference_mode():
        model.slow.table = torch.ones(16)
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(offered)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert receipt.optimized is (offered is DirectScale)
    if offered is DerivedScale:
        assert "slow.table was made in inference mode" in receipt.rejected[0].reason


def test_where_nothing_may_be_copied_what_copies_nothing_is_found():
    """However much faster the other is predicted to be, and is."""
    with torch.inference_mode():
        model = net()
    plugins = [plugin(DirectScale), plugin(DerivedScale, phase="compile")]
    kpt.optimize(model, torch.randn(32, 16), plugins=plugins, budget=20, cache=False)
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["DirectScale:direct"]
    assert {entry.name: entry.rule for entry in receipt.rejected} == {"DerivedScale:derived": "no-effect"}


def test_an_unfrozen_parameter_gets_its_gradient():
    model, x = net(True), torch.randn(8, 16)
    model.first.weight.requires_grad_(False)
    optimised(model, x)
    model.first.weight.requires_grad_(True)
    model(x).sum().backward()
    assert model.first.weight.grad is not None
    assert any("frozen" in reason for reason in reasons(model))


def test_an_unfrozen_parameter_gets_its_gradient_in_evaluation_mode_too():
    model, x = net(), torch.randn(8, 16)
    model.first.weight.requires_grad_(False)
    optimised(model, x)
    model.first.weight.requires_grad_(True)
    model(x).sum().backward()
    assert model.first.weight.grad is not None


class Scaled(SlowScale):
    def __init__(self) -> None:
        super().__init__(16)
        self.scaling = {"default": 1.0}
        self.temperature = torch.tensor(1.0)
        self.config = types.SimpleNamespace(double=False)
        self.settings = types.SimpleNamespace(inner=types.SimpleNamespace(triple=False))

    def forward(self, x):
        x = super().forward(x) * self.scaling["default"] / self.temperature
        x = x * 3 if self.settings.inner.triple else x
        return x * 2 if self.config.double else x


class Around(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.slow = SlowScale(16)

    def forward(self, x):
        return self.slow(self.inner(x))


class DirectOuter(DirectScale):
    """Replaces the outer scale only, so that the inner one's attributes still count."""

    def apply(self, model, variant):
        from slow_models import fast_forward

        model.slow.forward = types.MethodType(fast_forward, model.slow)
        self.applied = 1
        return lambda: model.slow.__dict__.pop("forward", None)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.scaling.update(default=3.0),
        lambda m: setattr(m, "temperature", torch.tensor(2.0)),
        lambda m: m.temperature.mul_(2.0),
        lambda m: setattr(m.config, "double", True),
        lambda m: setattr(m.settings.inner, "triple", True),
    ],
    ids=[
        "an entry of a dict",
        "a tensor attribute",
        "a tensor in place",
        "a switch of the config",
        "an object in an object",
    ],
)
def test_a_change_of_what_a_submodule_holds_is_served_by_the_original(change):
    torch.manual_seed(0)
    model, x = Around().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectOuter)], budget=20, cache=False)
    assert kpt.report(model).optimized
    change(model.inner)
    with torch.no_grad():
        assert torch.equal(model(x), type(model).forward(model, x))
    assert sum(reasons(model).values()) == 1


def test_another_autocast_dtype_is_served_by_the_original():
    model, x = net(), torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False)
        if not kpt.report(model).optimized:
            pytest.skip("nothing was faster under autocast here")
        model(x)
    assert not reasons(model)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        model(x)
    assert any("autocast" in reason for reason in reasons(model))


class Counting(SlowScale):
    def __init__(self) -> None:
        super().__init__(16)
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(len(x))
        return super().forward(x)


def test_a_forward_that_appends_to_a_list_is_left_alone():
    model, x = Counting().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "seen" in receipt.reason
    assert model.seen == []


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    note: str = "fine"


class Answering(SlowScale):
    def forward(self, x):
        return Answer(super().forward(x))


def test_gradients_flow_through_a_dataclass_and_to_the_second_order():
    torch.manual_seed(0)
    model, plain = torch.nn.Sequential(Answering(16)).eval(), torch.nn.Sequential(Answering(16)).eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 16)

    class Direct(DirectScale):
        def replacement(self):
            return lambda self, x: Answer(x * self.weight + self.bias)

    import slow_models

    slow_models.Direct, Direct.__module__, Direct.__qualname__ = Direct, "slow_models", "Direct"
    kpt.optimize(model, x, plugins=[plugin(Direct)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    found = []
    for candidate in (model, plain):
        given = x.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(candidate(given).scores.pow(2).sum(), given, create_graph=True)
        first.pow(2).sum().backward()
        found.append((given.grad, candidate[0].weight.grad))
    for mine, true in zip(*found):
        torch.testing.assert_close(mine, true)


def test_an_input_written_to_before_the_backward_is_an_error_as_in_eager():
    model, x = optimised(net(), torch.randn(8, 16)), torch.randn(8, 16)
    loss = model(x).sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


class OnePercent(DirectScale):
    def replacement(self):
        return lambda self, x: (x * self.weight + self.bias) * 1.01


def test_the_users_metric_outranks_the_tolerance():
    x = torch.randn(8, 16)
    loose = kpt.Accuracy(lambda model: 1.0, max_drop=0.0)
    for accuracy, kept in ((None, False), (loose, True)):
        import slow_models

        slow_models.OnePercent, OnePercent.__module__, OnePercent.__qualname__ = (
            OnePercent,
            "slow_models",
            "OnePercent",
        )
        model = net()
        kpt.optimize(model, x, plugins=[plugin(OnePercent)], accuracy=accuracy, budget=20, cache=False)
        assert kpt.report(model).optimized is kept, kpt.report(model)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def replace_forward(model):
    model.last.forward = lambda x: torch.zeros(len(x), 4)
    return lambda: delattr(model.last, "forward")


def replace_class(model):
    model.last.__class__ = Doubled
    return lambda: setattr(model.last, "__class__", torch.nn.Linear)


def replace_forward_beside_buffers(model):
    model.norm.forward = lambda x: x
    return lambda: delattr(model.norm, "forward")


@pytest.mark.parametrize("change", [replace_forward, replace_class, replace_forward_beside_buffers])
def test_a_submodule_that_computes_something_else_is_noticed_and_so_is_its_return(change):
    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    with torch.no_grad():
        before = model(x)
        put_back = change(model)
        changed = model(x)
        assert torch.equal(changed, type(model).forward(model, x)) and not torch.equal(changed, before)
        assert list(reasons(model).values()) == [1] and "was replaced" in next(iter(reasons(model)))
        put_back()
        assert torch.equal(model(x), before)
    assert kpt.report(model).calls["optimized"] == 2
    kpt.refresh(model)
    change(model)
    kpt.refresh(model)
    with torch.no_grad():
        assert torch.equal(model(x), changed)
    assert kpt.report(model).calls["optimized"] == 1


class Listed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([SlowScale(16), torch.nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layers.insert(1, torch.nn.Tanh()),
        lambda m: m.layers.pop(1),
        lambda m: m.layers.__delitem__(1),
        lambda m: m.layers.append(torch.nn.Tanh()),
        lambda m: setattr(m.layers, "_modules", {"0": torch.nn.Tanh(), "1": torch.nn.Tanh()}),
    ],
    ids=["inserted", "popped", "deleted", "appended", "all exchanged"],
)
def test_a_list_of_children_that_changes_is_noticed(change):
    model, x = Listed().eval(), torch.randn(8, 16)
    optimised(model, x)
    change(model)
    with torch.no_grad():
        assert torch.equal(model(x), Listed.forward(model, x))
    assert kpt.report(model).calls["optimized"] == 0


@pytest.mark.parametrize("look", [lambda m: m.train().eval(), kpt.report], ids=["mode", "report"])
def test_a_forward_set_past_setattr_is_noticed_after_a_look_at_everything(look):
    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    model.last.__dict__["forward"] = lambda x: torch.zeros(len(x), 4)
    look(model)
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(8, 4))


def test_a_call_without_such_a_write_compares_nothing(monkeypatch):
    from kpt.transaction.structure import Structure

    model, x = net(), torch.randn(8, 16)
    optimised(model, x)
    model(x)
    monkeypatch.setattr(Structure, "changed", lambda self: pytest.fail("everything was compared"))
    for _ in range(3):
        model(x)
        model.first(x)
    assert kpt.report(model).calls["optimized"] == 4


GAIN = 2.0
SETTINGS = {"shift": 1.0}
OPTIONS = types.SimpleNamespace(power=1)
CALLS = 0
STATISTICS = {"calls": 0}


def times_gain(x: torch.Tensor) -> torch.Tensor:
    return (x * GAIN + SETTINGS["shift"]) ** OPTIONS.power


class Reads(torch.nn.Module):
    """Reads what is on no module: a global of a function that it calls, its class, a default."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x):
        return times_gain(self.shifted(self.slow(x)) * self.scale)

    def shifted(self, x):
        return x + getattr(self, "shift", 1.0)


class ReadsInside(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, patch: patch.setitem(globals(), "GAIN", 3.0),
        lambda m, patch: patch.setitem(globals(), "GAIN", torch.tensor([1.0, 3.0] * 8)),
        lambda m, patch: patch.setitem(SETTINGS, "shift", 3.0),
        lambda m, patch: patch.setattr(OPTIONS, "power", 2),
        lambda m, patch: patch.setattr(Reads, "scale", 3.0),
        lambda m, patch: setattr(m.inner, "scale", 3.0),
        lambda m, patch: setattr(m.inner, "shift", 3.0),
        lambda m, patch: setattr(m.inner, "shifted", lambda x: x),
    ],
    ids=[
        "a global",
        "a tensor for a global",
        "a global dict",
        "a global object",
        "a class",
        "in place of the class's",
        "in place of a default",
        "a method",
    ],
)
def test_a_constant_that_is_on_no_module_and_one_that_comes_later_are_noticed(change, monkeypatch):
    model, x = ReadsInside().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(Captured)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    with torch.no_grad():
        before = model(x)
        change(model, monkeypatch)
        changed = model(x)
        assert torch.equal(changed, ReadsInside.forward(model, x)) and not torch.equal(changed, before)
    assert kpt.report(model).calls["optimized"] == 1 and list(reasons(model).values()) == [1]


class CountsInAnObject(torch.nn.Module):
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)
        self.statistics = types.SimpleNamespace(calls=0)

    def forward(self, x):
        self.count()
        return self.slow(x) * GAIN

    def count(self) -> None:
        self.statistics.calls += 1

    def counted(self) -> int:
        return CALLS + STATISTICS["calls"] + type(self).calls + self.statistics.calls


class CountsGlobally(CountsInAnObject):
    def count(self) -> None:
        global CALLS
        CALLS += 1


class CountsInADictionary(CountsInAnObject):
    def count(self) -> None:
        STATISTICS["calls"] += 1


class CountsOnItsClass(CountsInAnObject):
    def count(self) -> None:
        type(self).calls += 1


@pytest.mark.parametrize("made_by", [Captured, DirectScale])
@pytest.mark.parametrize("cls", [CountsGlobally, CountsInADictionary, CountsOnItsClass, CountsInAnObject])
def test_a_plan_counts_calls_as_the_model_does_or_is_rejected(cls, made_by):
    model, x = cls().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(made_by)], budget=20, cache=False)
    report = kpt.report(model)
    before = model.counted()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert model.counted() == before + 3
    if made_by is DirectScale:
        assert report.optimized and kpt.report(model).calls["optimized"] == 3, report


class MakesZeros(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, x):
        return self.slow(x) + torch.zeros(16)


def test_another_default_dtype_is_served_by_the_original():
    model, x = MakesZeros().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(Captured)], budget=20, cache=False)
    assert kpt.report(model).optimized, kpt.report(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert model(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(reasons(model)) == ["the default dtype is torch.float64; proven for torch.float32"]
    with torch.no_grad():
        assert model(x).dtype is torch.float32
    assert kpt.report(model).calls["optimized"] == 1


def test_a_model_and_its_part_are_optimised_one_at_a_time():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(Around(), SlowScale(16)).eval(), torch.randn(8, 16)
    with torch.no_grad():
        expected = model(x)
        optimised(model, x)
        optimised(model[0], x)
        assert torch.equal(model(x), expected)
        assert kpt.report(model[0]).calls["optimized"] == 1
        assert not kpt.report(model).optimized
        assert kpt.report(model).reason == "its part 0 was optimised by itself"
        optimised(model, x)
        assert not kpt.report(model[0]).optimized and "as a whole" in kpt.report(model[0]).reason
        assert torch.equal(model(x), expected)
        kpt.restore(model)
    kinds = {type(value) for module in model.modules() for value in vars(module).values()}
    assert not [kind for kind in kinds if kind.__module__.startswith("kpt")]
