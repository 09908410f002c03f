"""Norms through the C++ library, without a GPU: functions stand for the driver and for the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kpt_plugin_triton import tuning
from kpt_plugin_triton.native import norms as native

pytest.importorskip("triton")


ROWS, COLUMNS, PROGRAMS = 6, 20, 3
EPS, OFFSET = 1e-5, 0.25
FORWARD, BACKWARD, TOTAL = 101, 102, 103
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)
STREAM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
CONTEXT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


def tensor(address: int | None, *shape: int) -> torch.Tensor:
    """fp32 numbers at an address."""
    assert address and address % 16 == 0
    count = 1
    for size in shape:
        count *= size
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32).view(shape)


class Driver:
    """Starts kernels that are written in PyTorch, of layer_norm or rms_norm with weight and bias."""

    def __init__(self, centred: bool, wanted: int) -> None:
        self.centred, self.wanted = centred, wanted
        self.started: list[tuple[Any, ...]] = []
        self.codes: list[int] = []
        self.contexts: list[int] = []
        self.callbacks = LAUNCH(self.launch), STREAM(self.stream), CONTEXT(self.set_context)

    def addresses(self) -> tuple[int, ...]:
        return tuple(ctypes.cast(each, ctypes.c_void_p).value or 0 for each in self.callbacks)

    def stream(self, device: int, into: Any) -> int:
        into[0] = 77
        return 0

    def set_context(self, context: int) -> int:
        self.contexts.append(context)
        return 0

    def launch(self, function: int, *rest: Any) -> int:
        if self.codes and (code := self.codes.pop(0)):
            return code
        *sizes, stream, parameters, extra = rest
        self.started.append((function, *sizes, stream))
        places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))

        def pointer(number: int) -> int | None:
            return ctypes.c_void_p.from_address(places[number]).value

        {FORWARD: self.forward, BACKWARD: self.backward, TOTAL: self.total}[function](pointer, places)
        return 0

    def forward(self, pointer: Callable[[int], int | None], places: Any) -> None:
        x, weight, bias, y = (pointer(number) for number in range(4))
        rows, eps = ctypes.c_int32.from_address(places[4]), ctypes.c_float.from_address(places[5])
        assert (rows.value, eps.value) == (ROWS, pytest.approx(EPS))
        value = tensor(x, ROWS, COLUMNS)
        mean = value.mean(1) if self.centred else torch.zeros(ROWS)
        rstd = ((value - mean[:, None]).square().mean(1) + EPS).rsqrt()
        if self.wanted:
            tensor(pointer(6), ROWS).copy_(rstd)
            if self.centred:
                tensor(pointer(7), ROWS).copy_(mean)
        unit = (value - mean[:, None]) * rstd[:, None]
        tensor(y, ROWS, COLUMNS).copy_(
            unit * (tensor(weight, COLUMNS) + OFFSET) + (tensor(bias, COLUMNS) if bias else 0.0)
        )

    def backward(self, pointer: Callable[[int], int | None], places: Any) -> None:
        x, dy, dx = (tensor(pointer(number), ROWS, COLUMNS) for number in range(3))
        weight, rstd = tensor(pointer(3), COLUMNS) + OFFSET, tensor(pointer(4), ROWS)[:, None]
        unit = (x - (tensor(pointer(5), ROWS)[:, None] if self.centred else 0.0)) * rstd
        grad = dy * weight
        dx.copy_(grad - unit * (grad * unit).mean(1, keepdim=True))
        if self.centred:
            dx.sub_(grad.mean(1, keepdim=True))
        dx.mul_(rstd)
        for bit, number, values in ((2, 6, dy * unit), (4, 7, dy)):
            if self.wanted & bit:
                sums = tensor(pointer(number), PROGRAMS, COLUMNS)
                for program in range(PROGRAMS):
                    sums[program] = values[program::PROGRAMS].sum(0)

    def total(self, pointer: Callable[[int], int | None], places: Any) -> None:
        for bit, number in ((2, 0), (4, 2)):
            if self.wanted & bit:
                sums = tensor(pointer(number), PROGRAMS, COLUMNS)
                tensor(pointer(number + 1), COLUMNS).copy_(sums.sum(0))


def slots(*names: str) -> list[tuple[int, str, Any]]:
    return [(native._SLOTS.index(name), "", None) for name in names]


@pytest.fixture
def serve(norms_library: ModuleType) -> Iterator[Callable[..., tuple[Callable[..., Any], Driver]]]:
    """(norm, the driver) for fp32 [ROWS, COLUMNS] with a weight, a bias (layer_norm) and gradients wanted."""

    def begin(centred: bool = True, wanted: int = 7) -> tuple[Callable[..., Any], Driver]:
        driver = Driver(centred, wanted)
        norms_library.connect(*driver.addresses())
        numbers = [(-1, "i32", ROWS), (-1, "fp32", EPS)]
        first = FORWARD, (4, 1, 1), 128, 64, slots("x", "weight", "bias", "y") + numbers
        first[-1].extend(slots("rstd", "mean"))
        then = [(BACKWARD, (PROGRAMS, 1, 1), 256, 0, slots("x", "dy", "dx", "weight", "rstd", "mean"))]
        then[0][-1].extend(slots("weight_sums", "bias_sums"))
        if wanted & 6:
            ends = slots("weight_sums", "dweight", "bias_sums", "dbias")
            then.append((TOTAL, (1, 1, 1), 32, 0, ends))
        like, vector = torch.empty(ROWS, COLUMNS), torch.empty(COLUMNS)
        bias = vector if centred else None
        norms_library.add(
            like, vector, bias, EPS, OFFSET, centred, wanted, first, then if wanted else [], PROGRAMS, 5
        )

        def norm(x: Any, weight: Any, bias: Any = None, **other: Any) -> Any:
            given = {"eps": EPS, "offset": OFFSET, "centred": centred} | other
            return norms_library.norm(x, weight, bias, *given.values())

        return norm, driver

    yield begin
    norms_library.forget()


def inputs(wanted: int = 7, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(shape), torch.randn(COLUMNS), torch.randn(COLUMNS)]
    return [each.requires_grad_(bool(wanted >> place & 1)) for place, each in enumerate(made)]


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        return F.layer_norm(x, (COLUMNS,), weight + OFFSET, bias, EPS)
    return F.rms_norm(x, (COLUMNS,), weight + OFFSET, EPS)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5, 6, 7])
def test_values_and_gradients_are_those_of_the_launches(serve: Any, centred: bool, wanted: int) -> None:
    if not centred and wanted & 4:
        pytest.skip("rms_norm has no bias")
    norm, driver = serve(centred, wanted)
    given = inputs(wanted, (2, 3, COLUMNS))
    given = given if centred else given[:2]
    wide = [each.detach().double().requires_grad_(each.requires_grad) for each in given]
    y, exact = norm(*given), plain(*wide, *[None] * (3 - len(wide)))
    torch.testing.assert_close(y, exact.float())
    assert driver.started == [(FORWARD, 4, 1, 1, 128, 1, 1, 64, 77)]
    if not wanted:
        assert y.grad_fn is None
        return
    assert y.grad_fn is not None
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [each for each in given if each.requires_grad], upstream)
    right = torch.autograd.grad(exact, [each for each in wide if each.requires_grad], upstream.double())
    assert len(found) == len(right)
    for one, other in zip(found, right):
        torch.testing.assert_close(one, other.float())
    assert [each[0] for each in driver.started[1:]] == ([BACKWARD, TOTAL] if wanted & 6 else [BACKWARD])


def test_upstream_gradients_of_any_layout_and_none_at_all(serve: Any) -> None:
    norm, _ = serve()
    given = inputs()
    for upstream in (
        torch.ones(()).expand(ROWS, COLUMNS),
        torch.randn(COLUMNS, ROWS).t(),
        torch.randn(ROWS * COLUMNS + 1)[1:].view(ROWS, COLUMNS),
    ):
        found = torch.autograd.grad(norm(*given), given, upstream)
        right = torch.autograd.grad(plain(*given), given, upstream)
        for one, other in zip(found, right):
            torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad((norm(*given) * 0.0).detach().sum() + given[0].sum(), given[:1])
    assert (gradient == 1.0).all()


def test_a_kept_graph_is_run_again_and_a_freed_one_is_refused(serve: Any) -> None:
    norm, _ = serve()
    given = inputs()
    y = norm(*given)
    first = torch.autograd.grad(y.sum(), given, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y.sum(), given)):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), given)


def test_second_derivatives_are_refused(serve: Any) -> None:
    norm, _ = serve()
    given = inputs()
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(norm(*given).sum(), given, create_graph=True)


def test_a_write_to_what_was_saved_is_noticed(serve: Any) -> None:
    norm, _ = serve()
    given = inputs()
    y = norm(*given)
    with torch.no_grad():
        given[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_saved_is_what_python_saves(serve: Any) -> None:
    """A checkpointed call may be recorded by the one and repeated by the other, tensor by tensor."""
    norm, _ = serve()
    given = inputs()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        y = norm(*given)
    assert list(map(torch.Tensor.data_ptr, saved)) == list(map(torch.Tensor.data_ptr, given))
    y.sum().backward()
    assert given[0].grad is not None


class Recorded(torch.autograd.Function):
    """Stands for the node in Python: its result is the input, and it saves what that one does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        assert all(each is not None for each in ctx.saved_tensors)
        return upstream, None, None


def test_a_checkpoint_of_python_is_repeated_by_the_library(serve: Any) -> None:
    norm, driver = serve()
    given = inputs()
    calls: list[Any] = [Recorded.apply, norm]
    y = checkpoint(lambda *values: calls.pop(0)(*values), *given, use_reentrant=False)
    y.sum().backward()
    assert not calls and [each[0] for each in driver.started] == [FORWARD]
    assert given[0].grad is not None and (given[0].grad == 1.0).all()


class Kind(torch.Tensor):
    """A class of the user's own."""


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, w, b: (x.double(), w, b), id="dtype"),
        pytest.param(lambda x, w, b: (x[:3], w, b), id="rows"),
        pytest.param(lambda x, w, b: (torch.randn(COLUMNS, ROWS).t(), w, b), id="strides"),
        pytest.param(lambda x, w, b: (torch.randn(121)[1:].view(ROWS, COLUMNS), w, b), id="address"),
        pytest.param(lambda x, w, b: (x.as_subclass(Kind), w, b), id="class"),
        pytest.param(lambda x, w, b: (x.to("meta"), w, b), id="device"),
        pytest.param(lambda x, w, b: (x, w.half(), b), id="weight's dtype"),
        pytest.param(lambda x, w, b: (x, w[:3], b), id="weight's shape"),
        pytest.param(lambda x, w, b: (x, 2.0, b), id="no tensor"),
        pytest.param(lambda x, w, b: (x, w, None), id="no bias"),
        pytest.param(lambda x, w, b: (x[0, 0], w, b), id="no dimension"),
        pytest.param(lambda x, w, b: (x[:0], w, b), id="no rows"),
        pytest.param(lambda x, w, b: (x, w.detach(), b), id="another gradient wanted"),
        pytest.param(lambda x, w, b: (torch._neg_view(x.detach()), w, b), id="a view that negates"),
    ],
)
def test_other_calls_are_left_to_python(serve: Any, change: Any) -> None:
    norm, driver = serve()
    assert norm(*change(*inputs())) is None
    assert norm(*inputs(), eps=1e-3) is None and norm(*inputs(), eps="1") is None
    assert norm(*inputs(), offset=1) is None and norm(*inputs(), centred=False) is None
    assert not driver.started


def test_transforms_and_modes_are_left_to_python(serve: Any) -> None:
    norm, driver = serve(wanted=0)
    x, weight, bias = inputs(0)
    with Watched():
        assert norm(x, weight, bias) is None
    seen: list[Any] = []
    torch.func.vmap(lambda each: seen.append(norm(each, weight, bias)) or each)(x[None])
    torch.func.grad(lambda each: seen.append(norm(each, weight, bias)) or each.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(norm(torch.autograd.forward_ad.make_dual(x, x), weight, bias))
    assert seen == [None] * 3 and not driver.started
    assert norm(x, weight, bias) is not None


def test_a_thread_without_a_context_is_given_one_and_errors_are_raised(serve: Any) -> None:
    norm, driver = serve(wanted=0)
    driver.codes = [201]
    assert norm(*inputs(0)) is not None
    assert driver.contexts == [5] and len(driver.started) == 1
    driver.codes = [700]
    with pytest.raises(RuntimeError, match="could not be launched: error 700"):
        norm(*inputs(0))


def test_launches_can_be_planned_anew_while_a_graph_waits(
    serve: Any, norms_library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where tables are read again."""
    norm, driver = serve()
    monkeypatch.setattr(native, "_library", norms_library)
    given = inputs()
    y = norm(*given)
    tuning.forget()
    assert norm(*given) is None and norms_library.count() == 0
    y.sum().backward()
    assert given[0].grad is not None and len(driver.started) == 3
