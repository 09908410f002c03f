"""embedding_sum_norm against fp64: values, gradients, broadcast numbers, numbers out of range, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.embedding import embedding_sum_norm
from kpt_plugin_triton.references.embedding import embedding_sum_norm as plain

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device
FLOATS = ("words", "positions", "types", "weight", "bias")


def _inputs(batch=2, sequence=6, columns=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    found = {
        "ids": torch.randint(0, 11, (batch, sequence), generator=generator),
        "words": randn(11, columns),
        "position_ids": torch.arange(sequence)[None],
        "positions": randn(sequence + 2, columns),
        "type_ids": torch.randint(0, 2, (batch, sequence), generator=generator),
        "types": randn(2, columns),
        "weight": randn(columns),
        "bias": randn(columns),
    }
    return {name: value.to(DEVICE) for name, value in found.items()}


class TestEmbeddingSumNorm(TritonSuite):
    kernel = KERNELS["embedding_sum_norm"]
    rows = ()  # more or fewer entries of a table than its numbers say are no sizes of this op

    def arguments(self):
        return _inputs()

    def reference(self):
        return plain


def _compare(arguments, **more) -> None:
    named = {n: t.requires_grad_() if n in FLOATS else t for n, t in arguments.items() if t is not None}
    wanted = [named[name] for name in FLOATS if name in named]
    mine, true = embedding_sum_norm(**named, **more), plain(**named, **more)
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream),
        torch.autograd.grad(true, wanted, upstream),
        rtol=1e-4,
        atol=1e-4,
    )


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 4),
    sequence=st.integers(1, 9),
    columns=st.integers(2, 40),
    typed=st.booleans(),
    placed=st.sampled_from(("row", "line", "full", "column", "none")),
    affine=st.booleans(),
    padded=st.booleans(),
)
def test_any_size(batch, sequence, columns, typed, placed, affine, padded) -> None:
    arguments = _inputs(batch, sequence, columns)
    if not typed:
        arguments["type_ids"] = arguments["types"] = None
    places = arguments["position_ids"]
    arguments["position_ids"] = {
        "row": places,
        "line": places[0],
        "full": places.expand(batch, sequence).flip(-1),
        "column": torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE),
        "none": None,
    }[placed]
    if placed == "none":
        arguments["positions"] = None
    if not affine:
        arguments["weight"] = arguments["bias"] = None
    _compare(arguments, eps=1e-3, padding_idx=3 if padded else None)


def test_a_number_out_of_range_gives_nan_and_touches_no_other_row() -> None:
    arguments = _inputs()
    expected = embedding_sum_norm(**arguments)
    for wrong in (11, -1, 2**40):
        arguments["ids"][1, 2] = wrong
        out = embedding_sum_norm(**arguments)
        assert out[1, 2].isnan().all()
        out[1, 2] = expected[1, 2]
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_numbers_of_32_bits() -> None:
    arguments = _inputs()
    expected = embedding_sum_norm(**arguments)
    short = {n: t.to(torch.int32) if n.endswith("ids") else t for n, t in arguments.items()}
    torch.testing.assert_close(embedding_sum_norm(**short), expected, rtol=0, atol=0)
    _compare(short)


def test_gradients_by_differences() -> None:
    arguments = _inputs(columns=4, dtype=torch.float64)
    names = [name for name in arguments if name in FLOATS]
    fixed = {name: value for name, value in arguments.items() if name not in FLOATS}
    inputs = [arguments[name].requires_grad_() for name in names]
    assert gradcheck(lambda *a: embedding_sum_norm(**fixed, **dict(zip(names, a)), eps=1e-2), inputs)


def test_compiled() -> None:
    arguments = {n: t.requires_grad_() if n in FLOATS else t for n, t in _inputs().items()}
    wanted = [arguments[name] for name in FLOATS]
    compiled = torch.compile(embedding_sum_norm, fullgraph=True, backend="aot_eager")
    mine, true = compiled(**arguments), embedding_sum_norm(**arguments)
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    upstream = torch.randn_like(true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream), torch.autograd.grad(true, wanted, upstream)
    )


def test_nothing_in_nothing_out() -> None:
    arguments = _inputs(batch=0)
    arguments["words"].requires_grad_()
    out = embedding_sum_norm(**arguments)
    assert out.shape == (0, 6, 20)
    assert not torch.autograd.grad(out.sum(), arguments["words"])[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 6)}, "ids is float32; supported: int64, int32"),
        ({"words": torch.zeros(11)}, r"words is of shape \(11,\)"),
        ({"positions": torch.zeros(8, 19)}, r"positions is of shape \(8, 19\); supported: shape \(8, 20\)"),
        ({"types": torch.zeros(2, 20, dtype=torch.float16)}, "types is float16"),
        ({"types": None}, "type_ids is given; supported: both or neither"),
        ({"position_ids": torch.zeros(4, dtype=torch.int64)}, r"position_ids is of shape \(4,\)"),
        ({"weight": torch.zeros(19)}, "weight is of shape"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = {**_inputs(), **change}
    arguments = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    with pytest.raises(KernelInputError, match=f"^embedding_sum_norm: {message}"):
        embedding_sum_norm(**arguments)
