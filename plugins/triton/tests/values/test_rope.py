"""rope against fp64: values, gradients, layouts, sizes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_suite import InOneDtype, TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt.ops import reference
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.launch import INTERPRETED
from kpt_plugin_triton.rope import rope

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}
DEVICE = TritonSuite.device


class TestRope(TritonSuite):
    kernel = KERNELS["rope"]
    rows = (1, 7) if INTERPRETED else (1, 7, 33)
    most_rows = 5 if INTERPRETED else 70


class TestInterleavedRope(InOneDtype):
    """Pairs side by side, fewer key heads than query heads, features that do not turn."""

    kernel = KERNELS["rope"]
    most_rows = 5 if INTERPRETED else 70

    def arguments(self):
        generator = torch.Generator().manual_seed(1)
        q, k = torch.randn(2, 4, 6, 14, generator=generator), torch.randn(2, 2, 6, 14, generator=generator)
        cos, sin = (torch.randn(2, 6, 8, generator=generator) for _ in range(2))
        found = {name: t.to(self.device) for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin))}
        return {**found, "interleaved": True}


def _inputs(batch=2, heads=4, kv=2, sequence=5, width=16, turning=16, tables=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)

    q = randn(batch, sequence, heads, width).transpose(1, 2)
    k = randn(batch, sequence, kv, width).transpose(1, 2)
    return q, k, randn(tables, sequence, turning), randn(tables, sequence, turning)


def _launches(monkeypatch) -> list[tuple]:
    """What the kernel is launched with from now on, planned anew for each call."""
    from kpt_plugin_triton import rope as module

    seen, launch = [], module._rope

    def watched(*call):
        seen.append(call)
        return launch(*call)

    monkeypatch.setattr(module, "_rope", watched)
    monkeypatch.setattr(module, "_remembered_plan", module._plan)
    return seen


def test_a_projection_is_used_without_a_copy_and_keeps_its_layout(monkeypatch) -> None:
    """[B, S, (H + 2 Hkv) D] split and transposed, as models pass it."""
    fused = torch.randn(2, 5, 8 * 16, device=DEVICE)
    q, k, _ = fused.unflatten(-1, (8, 16)).transpose(1, 2).split((4, 2, 2), dim=1)
    _, _, cos, sin = _inputs()
    seen = _launches(monkeypatch)
    out = rope(q, k, cos, sin)
    assert seen[0][1][0].data_ptr() == q.data_ptr() and seen[0][1][1].data_ptr() == k.data_ptr()
    assert len(seen) == 1, "queries and keys turn in one launch"
    assert out[0].transpose(1, 2).is_contiguous() and out[1].transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, reference("rope")(q, k, cos, sin))


def test_the_backward_is_one_launch_that_saves_no_activation(monkeypatch) -> None:
    q, k, cos, sin = _inputs()
    q.requires_grad_(), k.requires_grad_()
    seen, saved = _launches(monkeypatch), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = rope(q, k, cos, sin)
    torch.autograd.grad(out, (q, k), tuple(map(torch.ones_like, out)))
    assert len(seen) == 2 and saved == [cos.shape, sin.shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("major, tables", [(True, 1), (False, 2)])
def test_rows_in_one_piece(dtype, major, tables, monkeypatch) -> None:
    """As tables may ask for: the same values and gradients, where the last tile has too few tokens too."""
    from kpt_plugin_triton import rope as module

    q, k, cos, sin = _inputs(3, 3, 2, 7, 32, 32, 3 if tables > 1 else 1, dtype)
    q, k = (x if major else x.contiguous() for x in (q, k))
    seen = _launches(monkeypatch)
    upstream = tuple(x.flip(-1) for x in (q, k))
    results = []
    for whole in (0, 1):
        options = {"TOKENS": 2, "HEADS": 4, "num_warps": 1, "WHOLE": whole}
        monkeypatch.setattr(module, "options_of", lambda *_, options=options: options)
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        out = rope(*leaves, cos, sin)
        results.append((*out, *torch.autograd.grad(out, leaves, upstream)))
    assert [whole for _, _, constants, *_ in seen for whole in constants[-3:-2]] == [False, False, True, True]
    for pairs, one_piece in zip(*results):
        assert one_piece.stride() == pairs.stride()
        torch.testing.assert_close(one_piece, pairs)


@pytest.mark.parametrize("width, turning, interleaved", [(24, 24, False), (32, 16, False), (32, 32, True)])
def test_other_rows_are_read_in_pairs_whatever_the_table_says(
    width, turning, interleaved, monkeypatch
) -> None:
    from kpt_plugin_triton import rope as module

    options = {"TOKENS": 2, "HEADS": 2, "num_warps": 1, "WHOLE": 1}
    monkeypatch.setattr(module, "options_of", lambda *_: options)
    monkeypatch.setattr(module, "_remembered_plan", module._plan)
    q, k, cos, sin = _inputs(width=width, turning=turning)
    torch.testing.assert_close(
        rope(q, k, cos, sin, interleaved), reference("rope")(q, k, cos, sin, interleaved=interleaved)
    )


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    kv=st.integers(1, 3),
    sequence=st.integers(1, 9),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
    shared=st.booleans(),
    interleaved=st.booleans(),
    token_major=st.booleans(),
)
def test_any_size(batch, heads, kv, sequence, half, rest, shared, interleaved, token_major) -> None:
    tables = 1 if shared else batch
    q, k, cos, sin = _inputs(batch, heads, kv, sequence, 2 * half + rest, 2 * half, tables)
    if not token_major:
        q, k = q.contiguous(), k.contiguous()
    inputs = tuple(t.detach().requires_grad_() for t in (q, k, cos, sin))
    mine, true = rope(*inputs, interleaved), reference("rope")(*inputs, interleaved)
    torch.testing.assert_close(mine, true)
    upstream = tuple(torch.randn_like(t) for t in true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, inputs, upstream), torch.autograd.grad(true, inputs, upstream)
    )


@pytest.mark.parametrize("interleaved", (False, True))
def test_gradients_of_everything_by_differences(interleaved: bool) -> None:
    inputs = tuple(t.detach().requires_grad_() for t in _inputs(1, 2, 1, 3, 6, 4, 1, dtype=torch.float64))
    assert gradcheck(lambda *a: rope(*a, interleaved), inputs)


@pytest.mark.parametrize("learned", (False, True))
def test_compiled(learned: bool) -> None:
    inputs = [t.requires_grad_(learned or i < 2) for i, t in enumerate(_inputs())]
    wanted = [t for t in inputs if t.requires_grad]
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    mine, true = compiled(*inputs), rope(*inputs)
    torch.testing.assert_close(mine, true, rtol=0, atol=0)
    assert [t.stride() for t in mine] == [t.stride() for t in true]
    upstream = tuple(torch.randn_like(t) for t in true)
    torch.testing.assert_close(
        torch.autograd.grad(mine, wanted, upstream), torch.autograd.grad(true, wanted, upstream)
    )


def test_nothing_in_nothing_out() -> None:
    q, k, cos, sin = _inputs(sequence=0)
    assert [t.shape for t in rope(q, k, cos, sin)] == [q.shape, k.shape]
    q, k, cos, sin = _inputs(batch=0)
    assert [t.shape for t in rope(q, k, cos, sin)] == [q.shape, k.shape]


def test_half_precision_tables_and_mixed_dtypes() -> None:
    q, k, cos, sin = _inputs()
    out = rope(q.half(), k.half(), cos, sin)
    true = reference("rope")(q.half().double(), k.half().double(), cos.double(), sin.double())
    for mine, right in zip(out, true):
        assert mine.dtype == torch.float16
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 5, 16, dtype=torch.int32)}, "q is int32"),
        ({"q": torch.zeros(2, 5, 16)}, r"q is of shape \(2, 5, 16\)"),
        ({"k": torch.zeros(2, 2, 6, 16)}, r"k is of shape .*supported: shape \(2, 2, 5, 16\)"),
        ({"k": torch.zeros(2, 2, 5, 16, dtype=torch.float16)}, "k is float16"),
        ({"cos": torch.zeros(1, 1, 5, 16)}, r"cos is of shape .*\(1 or 2, 5, R\)"),
        ({"cos": torch.zeros(1, 5, 18)}, "an even R from 2 to 16"),
        ({"cos": torch.zeros(1, 5, 7), "sin": torch.zeros(1, 5, 7)}, "an even R"),
        ({"sin": torch.zeros(1, 5, 8)}, "sin is of shape"),
        ({"sin": 1.0}, "sin is a float"),
    ],
)
def test_bad_arguments_are_named(change, message: str) -> None:
    arguments = dict(zip(("q", "k", "cos", "sin"), _inputs()))
    arguments.update({n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in change.items()})
    with pytest.raises(KernelInputError, match=f"^rope: .*{message}"):
        rope(**arguments)
