"""Launches without a GPU: what reaches a compiled kernel's entry, and which way; second derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton import launch, registration
from kpt_plugin_triton.launch import Bound, Kernel


class Compiled:
    """Stands for kernels: remembers what was compiled, and with what each was started."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.started: list[tuple[Any, ...]] = []
        self.device: int | None = None

    def prepare(
        self, kernel: Kernel, key: Any, grid: Any, arguments: Any, constants: Any, *options: Any
    ) -> Any:
        number = len(self.compiled)
        self.compiled.append((arguments, constants, *options))

        def run(*given: Any) -> None:
            self.started.append((number, *given))

        found = kernel._ready[key] = run, "handle", ("metadata", None)
        return found


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    stand_in = Compiled()
    monkeypatch.setattr(launch, "_indirect", False)
    monkeypatch.setattr(launch, "_current_device", lambda: stand_in.device)
    monkeypatch.setattr(launch, "_stream_of", lambda device: "stream")
    monkeypatch.setattr(Kernel, "_prepare", lambda kernel, *call: stand_in.prepare(kernel, *call))
    launch._maker.cache_clear()
    yield stand_in
    launch._maker.cache_clear()


def kernel() -> Kernel:
    class Function:
        @staticmethod
        def fn() -> None:
            """What a kernel is named after."""

    return Kernel(Function)


def general_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls that take the way through the kernel's own call from now on."""
    seen: list[tuple[Any, ...]] = []
    call = Kernel.__call__

    def watched(one: Kernel, grid: Any, arguments: Any, *rest: Any) -> Any:
        seen.append(arguments)
        return call(one, grid, arguments, *rest)

    monkeypatch.setattr(Kernel, "__call__", watched)
    return seen


def test_a_bound_launch_passes_what_the_kernel_is_passed(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    general = general_calls(monkeypatch)
    bound = Bound(kernel(), (3, 2, 1), ("C", 7), 8, 4)
    for _ in range(3):
        x, y = torch.empty(4), torch.empty(4, dtype=torch.bfloat16)
        bound.start(x, None, y, 5, 0.5)
        assert compiled.started[-1] == (
            *(0, 3, 2, 1, "stream", "handle", "metadata", None),
            *(x.data_ptr(), None, y.data_ptr(), 5, 0.5, "C", 7),
        )
    assert len(compiled.compiled) == 1 and compiled.compiled[0][1:] == (("C", 7), 8, 4)
    assert len(general) == 1, "from the second call on, nothing is looked up"


X, Y = torch.empty(16), torch.empty(16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "unlike",
    [
        pytest.param((X, None, Y.float(), 5, 0.5), id="another dtype"),
        pytest.param((X, Y, Y, 5, 0.5), id="a tensor where none was"),
        pytest.param((X, None, None, 5, 0.5), id="none where a tensor was"),
        pytest.param((X[1:], None, Y, 5, 0.5), id="an address that is no multiple of 16"),
        pytest.param((X, None, Y, 16, 0.5), id="another integer"),
    ],
)
def test_other_arguments_go_through_the_kernels_own_call(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, unlike: tuple[Any, ...]
) -> None:
    """They are compiled for themselves, and do not change what the others are started with."""
    bound, usual = Bound(kernel(), (1, 1, 1), ("C",)), (X, None, Y, 5, 0.5)
    bound.start(*usual)
    general = general_calls(monkeypatch)
    bound.start(*unlike)
    assert len(general) == 1 and len(compiled.compiled) == 2 and compiled.started[-1][0] == 1
    pointers = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in unlike]
    assert list(compiled.started[-1][-6:-1]) == pointers
    bound.start(*usual)
    assert len(general) == 1 and compiled.started[-1][0] == 0


def test_a_first_address_that_is_no_multiple_of_16_stands_for_no_other(compiled: Compiled) -> None:
    """Of a kernel compiled for such addresses, loads of 16 bytes would take four times as long."""
    bound = Bound(kernel(), (1, 1, 1), ())
    bound.start(X[1:], 1)
    bound.start(X, 1)
    bound.start(X, 1)
    assert [number for number, *_ in compiled.started] == [0, 1, 1]


def test_a_bound_launch_is_made_on_its_own_device(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another device became the current one since, the kernel's own call changes it for the launch."""
    bound = Bound(kernel(), (1, 1, 1), ())
    bound.start(X, 1)
    moved: list[Any] = []
    monkeypatch.setattr(Kernel, "_on_device", lambda one, device, *call: moved.append(device))
    compiled.device = 1
    bound.start(X, 1)
    assert moved == [None] and len(compiled.started) == 1


def test_the_first_argument_may_be_absent(compiled: Compiled) -> None:
    """As the sums for a weight that is frozen, beside a bias that is trained."""
    bound = Bound(kernel(), (1, 1, 1), ())
    for _ in range(2):
        bound.start(None, X, 1)
    assert [given[-3:] for given in compiled.started] == [(None, X.data_ptr(), 1)] * 2


@pytest.mark.parametrize(("name", "early"), [("sm_90", True), ("sm_80", False), ("gfx942", False)])
def test_only_kernels_that_wait_are_started_early_and_where_that_is_known(
    monkeypatch: pytest.MonkeyPatch, name: str, early: bool
) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: name)
    monkeypatch.setattr(launch, "_entry", lambda compiled: ("run", "handle", ()))
    seen: list[dict[str, Any]] = []

    class Function:
        fn = kernel

        @staticmethod
        def warmup(*given: Any, **options: Any) -> object:
            seen.append(options)
            return object()

    for overlapped in (True, False):
        Kernel(Function, overlapped)._prepare("key", (1, 1, 1), (None, X), (), 4, 3)
    usual = {"grid": (1, 1, 1), "num_warps": 4, "num_stages": 3}
    assert seen == [{**usual, "launch_pdl": True} if early else usual, usual]


def test_launches_are_recorded_through_a_bound_one() -> None:
    bound = Bound(kernel(), (1, 1, 1), ("C",), 2, 5)
    with launch.recording("sm_90") as record:
        bound.start(X, 1)
        bound.start(X, 1)
    assert [(one.constants, one.num_warps, one.num_stages) for one in record.launches] == [(("C",), 2, 5)] * 2


def test_norms_pass_fractions_whatever_they_are_given() -> None:
    """A kernel compiled for an offset of 1 cannot be started with one of 0.5."""
    from kpt_plugin_triton import norms

    with launch.recording("sm_90") as record:
        norms.rms_norm(torch.empty(4, 8, device="meta"), torch.empty(8, device="meta"), 1, 1)
    assert [type(value) for value in record.launches[0].arguments[-2:]] == [float, float]


@pytest.mark.parametrize(("target", "early"), [("sm_90", 1), ("sm_80", 0), ("gfx942", 0)])
def test_products_of_few_rows_start_early_where_that_was_faster(target: str, early: int) -> None:
    from kpt_plugin_triton import skinny

    def last_constant(rows: int, features: int, dtype: torch.dtype) -> Any:
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(features, 4096, dtype=dtype, device="meta")
        with launch.recording(target) as record:
            if dtype is torch.int8:
                skinny.linear_int8(x, weight, torch.empty(features, device="meta"))
            else:
                skinny.linear(x, weight)
        return record.launches[0].constants[-1]

    assert last_constant(1, 4096, torch.bfloat16) == bool(early)
    assert last_constant(1, 4096, torch.int8) == 0
    assert last_constant(4, 4096, torch.bfloat16) == 4 * early
    assert last_constant(4, 28672, torch.bfloat16) == last_constant(4, 4096, torch.int8) == 0


class Doubled(torch.autograd.Function):
    recorded: list[bool] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    @registration.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        Doubled.recorded.append(torch.is_grad_enabled())
        return upstream * 2


def test_a_first_derivative_is_not_recorded_and_a_second_is_refused() -> None:
    Doubled.recorded.clear()
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Doubled.apply(x * x).sum(), x)
    assert gradient.tolist() == [4.0] * 3
    (gradient,) = torch.autograd.grad(Doubled.apply(x * x).pow(2).sum(), x, create_graph=True)
    assert gradient.tolist() == [16.0] * 3
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    assert Doubled.recorded == [False, False]
