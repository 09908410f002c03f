"""Arguments that equal their defaults: passed or left out, it is the same call."""

from __future__ import annotations

import enum
import functools

import pytest
import torch

from fingerprints import fallbacks, fast_calls, optimized
from kpt.transaction.signature import constant_defaults, defaults_in
from slow_models import DirectScale, net, plugin

PLUGINS = [plugin(DirectScale)]
NOTHING_IN_IT: list[int] = []


class Pooling(enum.Enum):
    FIRST = "first"
    MEAN = "mean"


class Optional(torch.nn.Module):
    """A forward with a default of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        scale: float = 0.0,
        layers: int = 1,
        flag: bool = True,
        name: str = "sum of all",
        pooling: Pooling = Pooling.FIRST,
        skipped: list[int] = NOTHING_IN_IT,
        **more: object,
    ):
        y = self.net(x) + scale + layers - 1
        if mask is not None:
            y = y * mask
        if more or skipped or name != "sum of all" or pooling is not Pooling.FIRST:
            y = y + 1
        return y if flag else (y,)


def ready(example: object) -> Optional:
    model = Optional().eval()
    optimized(model, example, plugins=PLUGINS)
    return model


@pytest.mark.parametrize(
    "passed",
    [
        {"mask": None},
        {"scale": 0.0},
        {"layers": 1},
        {"flag": True},
        {"name": " ".join(["sum", "of", "all"])},
        {"pooling": Pooling.FIRST},
        {"pooling": Pooling.FIRST, "mask": None, "name": "sum of all"},
    ],
)
def test_a_default_that_is_passed_is_served(passed):
    x = torch.randn(32, 16)
    model = ready(x)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x, **passed), Optional().eval()(x))
        model(x)
    assert fast_calls(model) == 3 and not fallbacks(model)


def test_what_is_remembered_of_one_call_serves_its_like_only():
    x = torch.randn(32, 16)
    model = ready([{"x": x}, {"x": x, "mask": torch.ones(4)}])
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x, flag=True), Optional().eval()(x))
            assert torch.equal(model(x, torch.zeros(4), flag=True), torch.zeros(32, 4))
            assert isinstance(model(x, flag=False), tuple)
        assert fast_calls(model) == 6 and sum(fallbacks(model).values()) == 3
        model(x[:7], flag=True)
        model.net.slow.weight.data = torch.ones(16)
        assert torch.equal(model(x, flag=True), Optional.forward(model, x))


def test_a_default_that_is_passed_by_position_is_served():
    x = torch.randn(32, 16)
    model = ready(x)
    with torch.no_grad():
        model(x, None, 0.0)
    assert fast_calls(model) == 1 and not fallbacks(model)


@pytest.mark.parametrize(
    "passed",
    [
        {"mask": torch.zeros(4)},
        {"scale": -0.0},
        {"scale": 0},
        {"scale": False},
        {"layers": True},
        {"layers": 1.0},
        {"layers": 2},
        {"flag": 1},
        {"flag": False},
        {"name": "mean"},
        {"pooling": Pooling.MEAN},
        {"pooling": "first"},
        {"skipped": []},
        {"skipped": NOTHING_IN_IT},
        {"unknown": None},
    ],
)
def test_another_value_than_the_default_is_not_served(passed):
    x = torch.randn(32, 16)
    model = ready(x)
    with torch.no_grad():
        if "scale" in passed:  # what is remembered of the default is not taken for what equals it
            model(x, scale=0.0)
        found, expected = model(x, **passed), Optional().eval()(x, **passed)
    assert type(found) is type(expected) and torch.equal(found[0], expected[0])
    assert fast_calls(model) == ("scale" in passed) and sum(fallbacks(model).values()) == 1


@pytest.mark.parametrize("written", [{"mask": None}, {"mask": None, "flag": True}])
def test_a_default_that_only_the_example_passed_may_be_left_out(written):
    x = torch.randn(32, 16)
    model = ready([{"x": x, **written}])
    with torch.no_grad():
        expected = Optional().eval()(x)
        for call in ({}, written, {"mask": None}, {"layers": 1}, {"scale": 0.0, **written}):
            assert torch.equal(model(x, **call), expected)
        assert fast_calls(model) == 5 and not fallbacks(model)
        assert isinstance(model(x, flag=False), tuple)
        model(x, mask=torch.ones(4))
    assert fast_calls(model) == 5 and sum(fallbacks(model).values()) == 2


def test_a_value_that_the_example_passed_may_not_be_left_out():
    x = torch.randn(32, 16)
    model = ready([{"x": x, "flag": False}])
    with torch.no_grad():
        assert isinstance(model(x), torch.Tensor) and isinstance(model(x, flag=True), torch.Tensor)
        assert fast_calls(model) == 0 and sum(fallbacks(model).values()) == 2
        assert isinstance(model(x, flag=False, mask=None), tuple)
    assert fast_calls(model) == 1


def test_each_example_says_which_defaults_it_passed():
    x = torch.randn(32, 16)
    model = ready([{"x": x, "flag": False}, {"x": x, "mask": None, "layers": 2}])
    with torch.no_grad():
        assert isinstance(model(x, flag=False, mask=None), tuple)
        assert isinstance(model(x, layers=2), torch.Tensor)
        assert fast_calls(model) == 2
        model(x)
    assert fast_calls(model) == 2 and sum(fallbacks(model).values()) == 1


def test_the_reason_is_the_one_that_is_left():
    x = torch.randn(32, 16)
    model = ready(x)
    with torch.no_grad():
        model(x[:7], mask=None)
    (reason,) = fallbacks(model)
    assert reason.startswith("dimension 0 of 'x' is 7; proven for 32")


def test_a_wrong_call_with_a_default_raises_what_python_raises():
    x = torch.randn(32, 16)
    model = ready(x)
    for args, kwargs in (((), {"mask": None}), ((x, None), {"mask": None})):
        with pytest.raises(TypeError) as expected:
            Optional()(*args, **kwargs)
        with pytest.raises(TypeError) as found:
            model(*args, **kwargs)
        assert str(found.value) == str(expected.value)


def tells_apart(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) + ("mask" in kwargs)

    return wrapper


class Wrapped(Optional):
    forward = tells_apart(Optional.forward)


def test_a_wrapper_may_tell_a_default_that_is_passed_from_one_that_is_not():
    x, model = torch.randn(32, 16), Wrapped().eval()
    optimized(model, x, plugins=PLUGINS)
    with torch.no_grad():
        assert torch.equal(model(x, mask=None), Wrapped().eval()(x, mask=None))
        assert not torch.equal(model(x, mask=None), model(x))
    assert fast_calls(model) == 1 and sum(fallbacks(model).values()) == 2


def _positional(a=None, b=None, /, c=None, *rest, d=None, e=torch.ones(1), f=(), **more):  # noqa: B008
    return a, b, c, rest, d, e, f, more


def test_only_what_can_go_by_name_has_a_default_to_leave_out():
    assert constant_defaults(_positional) == {"c": None, "d": None}
    assert constant_defaults(functools.partial(_positional, c=1)) == {}
    assert constant_defaults(torch.relu) == {} and constant_defaults(torch.nn.ReLU()) == {}
    assert set(constant_defaults(Optional().forward)) == {
        "mask",
        "scale",
        "layers",
        "flag",
        "name",
        "pooling",
    }

    class Odd:
        def forward(self=None, x=None):
            return x

    assert constant_defaults(Odd().forward) == {"x": None}
    assert defaults_in({"x": None, "y": None}, {"x": None}) == {"x": None}
    assert defaults_in({"x": torch.zeros(2)}, {"x": 0.0}) == {}
    assert defaults_in({"x": float("nan")}, {"x": float("nan")}).keys() == {"x"}
