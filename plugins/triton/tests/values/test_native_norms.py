"""Norms through the C++ library on a GPU: the bits of the launches from Python."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kpt_plugin_triton import norms
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.native import norms as native

if INTERPRETED:
    pytest.skip("kernels that are interpreted are launched from Python", allow_module_level=True)

OPS = {"rms_norm": 1, "layer_norm": 2}
SIZES = ((1, 1), (7, 33), (64, 1024), (3, 8192), (2, 12000), (2, 40000))


@pytest.fixture(scope="module", autouse=True)
def in_use() -> None:
    state = native.wait()
    if state != "in use":
        pytest.skip(state)


def step(op: str, given: list[torch.Tensor], upstream: torch.Tensor) -> tuple[str, list[torch.Tensor]]:
    """What recorded the call, and its result with all gradients that are wanted."""
    y = getattr(norms, op)(*given)
    wanted = [each for each in given if each.requires_grad]
    found = torch.autograd.grad(y, wanted, upstream) if wanted else ()
    return (y.grad_fn.name() if y.grad_fn is not None else ""), [y.detach(), *found]


def inputs(op: str, rows: int, columns: int, dtype: torch.dtype, wanted: int) -> list[torch.Tensor]:
    made = [torch.randn(rows, columns, device="cuda", dtype=dtype)]
    made += [torch.randn(columns, device="cuda", dtype=dtype) for _ in range(OPS[op])]
    return [each.requires_grad_(bool(wanted >> place & 1)) for place, each in enumerate(made)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_are_those_of_launches_from_python(op: str, dtype: torch.dtype) -> None:
    for rows, columns in SIZES:
        for wanted in range(4 * OPS[op]):
            native.forget()
            given = inputs(op, rows, columns, dtype, wanted)
            upstream = torch.randn(rows, columns, device="cuda", dtype=dtype)
            (before, first), (after, second), (_, third) = (step(op, given, upstream) for _ in range(3))
            assert "CppNode" not in before
            assert not wanted or "CppNode" in after
            for values in zip(first, second, third):
                assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_every_element_is_written() -> None:
    given = inputs("layer_norm", 65, 4096, torch.bfloat16, 7)
    upstream = torch.randn_like(given[0])
    step("layer_norm", given, upstream)
    _, right = step("layer_norm", given, upstream)
    for _ in range(3):  # what is allocated next has held NaN
        spoiled = [torch.full_like(each, float("nan")) for each in right]
        del spoiled
        assert all(map(torch.equal, step("layer_norm", given, upstream)[1], right))


def test_two_streams_and_threads_of_their_own() -> None:
    given = inputs("rms_norm", 2048, 1024, torch.bfloat16, 3)
    upstream = torch.randn_like(given[0])
    step("rms_norm", given, upstream)
    _, right = step("rms_norm", given, upstream)
    torch.cuda.synchronize()
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    kind, found = step("rms_norm", given, upstream)
                    torch.cuda.current_stream().synchronize()
                    if "CppNode" not in kind or not all(map(torch.equal, found, right)):
                        wrong.append(kind)
        except Exception as error:  # noqa: BLE001 - reported by the assertion below
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_checkpoint_recorded_by_python_is_repeated_by_the_library() -> None:
    native.forget()
    given = inputs("layer_norm", 64, 1024, torch.bfloat16, 7)
    upstream = torch.randn_like(given[0])
    with_checkpoint = checkpoint(norms.layer_norm, *given, use_reentrant=False)
    step("layer_norm", given, upstream)
    kind, right = step("layer_norm", given, upstream)
    assert "CppNode" in kind and "CppNode" not in with_checkpoint.grad_fn.name()
    assert all(map(torch.equal, torch.autograd.grad(with_checkpoint, given, upstream), right[1:]))


def test_captured_into_a_graph() -> None:
    given = inputs("layer_norm", 256, 1024, torch.bfloat16, 7)
    upstream = torch.randn_like(given[0])
    for _ in range(2):
        step("layer_norm", given, upstream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kind, found = step("layer_norm", given, upstream)
    assert "CppNode" in kind
    with torch.no_grad():
        given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    assert all(map(torch.equal, found, step("layer_norm", given, upstream)[1]))
