"""Norms against fp64: values, gradients, layouts, sizes."""

from __future__ import annotations

import pytest
import torch
from triton_suite import TritonSuite, gradcheck

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import norm_rows, norms
from kpt_plugin_triton.checks import KernelInputError
from kpt_plugin_triton.native import norms as native

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}


class TestRmsNorm(TritonSuite):
    kernel = KERNELS["rms_norm"]


class TestAddRmsNorm(TritonSuite):
    kernel = KERNELS["add_rms_norm"]


class TestLayerNorm(TritonSuite):
    kernel = KERNELS["layer_norm"]


class TestAddLayerNorm(TritonSuite):
    kernel = KERNELS["add_layer_norm"]

    def arguments(self):
        generator = torch.Generator(self.device).manual_seed(0)
        x, residual = (torch.randn(3, 5, 40, generator=generator, device=self.device) for _ in range(2))
        weight, bias = (torch.randn(40, generator=generator, device=self.device) for _ in range(2))
        return {"x": x, "residual": residual, "weight": weight, "bias": bias, "eps": 1e-5}

    def reference(self):
        from kpt_plugin_triton.references.norms import add_layer_norm

        return add_layer_norm


OPS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
DEVICE = TritonSuite.device


def arguments(op: str, *shape: int, dtype=torch.float32, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE, dtype=dtype).requires_grad_(grad)

    given = [drawn(*shape), drawn(*shape)] if op.startswith("add") else [drawn(*shape)]
    return [*given, drawn(shape[-1]), *([drawn(shape[-1])] if op.endswith("layer_norm") else [])]


def reference(op: str):
    from kpt.ops import reference
    from kpt_plugin_triton.references.norms import add_layer_norm

    return add_layer_norm if op == "add_layer_norm" else reference(op)


def outputs(value) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("columns", [1, 3, 8193, 20000])
def test_widths_that_no_block_divides(op, columns) -> None:
    """One column, and rows that do not fit in registers, forward (20000 in fp32) or backward (8193)."""
    given = arguments(op, 3, columns, grad=True)
    true = [value.detach().double().requires_grad_() for value in given]
    mine, right = outputs(getattr(norms, op)(*given)), outputs(reference(op)(*true))
    upstream = [torch.randn_like(value) for value in mine]
    torch.autograd.backward(mine, upstream)
    torch.autograd.backward(right, [value.double() for value in upstream])
    for one, other in zip([*mine, *(v.grad for v in given)], [*right, *(v.grad for v in true)]):
        scale = other.norm() + 1.0
        if columns == 1:
            # No gradient but rounding, as large as what cancels: upstream / |x|, or over sqrt(eps) where the
            # mean is taken off.
            normed = (true[0] + true[1] if op.startswith("add") else true[0]).detach().abs().clamp_min(1e-3)
            divisor = 1e-5**0.5 if op.endswith("layer_norm") else normed
            scale = scale + sum((value.double() / divisor).norm() for value in upstream)
        assert (one.double() - other).norm() / scale < 2e-6


@pytest.mark.parametrize("op", OPS)
def test_a_first_column_that_stands_out(op) -> None:
    """Rows too long for registers: by 10000, where a sum of squares over that column loses three digits."""
    given = arguments(op, 2, 20000)
    given[0][:, 0] = 1e4
    mine = outputs(getattr(norms, op)(*given))
    for value, right in zip(mine, outputs(reference(op)(*(x.double() for x in given)))):
        assert (value.double() - right).norm() / right.norm() < 2e-6
        # the one column is most of the norm
        assert (value.double() - right)[:, 1:].norm() / right[:, 1:].norm() < 2e-6


@pytest.mark.parametrize("op", OPS)
def test_rows_that_are_read_twice(monkeypatch, op) -> None:
    """As tables ask for it by ROWS = 0; with a residual the row stays in registers."""
    options = {"ROWS": 0, "BLOCK": 16, "num_warps": 1}
    launched = []
    for name in ("_forward", "_forward_long"):
        kernel = getattr(norm_rows, name)
        monkeypatch.setattr(
            norm_rows, name, lambda *call, n=name, k=kernel: (launched.append(n), k(*call))[1]
        )
    for name in ("forward_options", "centred_forward_options"):
        monkeypatch.setattr(norm_rows, name, lambda *sizes: options)
    monkeypatch.setattr(norm_rows, "_forward_plan", norm_rows.plan_forward)
    monkeypatch.setattr(native, "norm", None)  # Python launches
    given = arguments(op, 3, 40)
    mine = outputs(getattr(norms, op)(*given))
    for value, right in zip(mine, outputs(reference(op)(*(x.double() for x in given)))):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    assert launched == ["_forward" if op.startswith("add") else "_forward_long"]


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op) -> None:
    given = arguments(op, 2, 0, 8, grad=True)
    made = outputs(getattr(norms, op)(*given))
    assert all(value.shape == (2, 0, 8) for value in made)
    torch.autograd.backward(made, [torch.zeros_like(value) for value in made])
    assert all(float(value.grad.abs().sum()) == 0.0 for value in given)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op) -> None:
    given = arguments(op, 3, 5, dtype=torch.float64, grad=True)
    assert gradcheck(getattr(norms, op), given)


def test_a_second_derivative_is_refused_by_name() -> None:
    x, weight = arguments("rms_norm", 2, 8, grad=True)
    (gradient,) = torch.autograd.grad(norms.rms_norm(x, weight).sum(), x, create_graph=False)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(norms.rms_norm(x, weight).sum(), x, create_graph=True)


def test_gradients_only_where_they_are_wanted() -> None:
    x, weight = arguments("rms_norm", 4, 16)
    norms.rms_norm(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen = weight.detach()
    norms.rms_norm(x.requires_grad_(), frozen).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("op", OPS)
def test_traced_whole_with_gradients(op) -> None:
    """fullgraph, forward and backward; what the compiler sees gives what eager gives."""
    given = arguments(op, 2, 3, 24, grad=True)
    function = getattr(norms, op)

    def step(*values):
        made = outputs(function(values[0] * 2, *values[1:]))
        return sum(value.sin().sum() for value in made)

    eager = torch.autograd.grad(step(*given), given)
    traced = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*given), given)
    for one, other in zip(eager, traced):
        torch.testing.assert_close(one, other)


def test_exported() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16, device=DEVICE))

        def forward(self, x):
            return norms.rms_norm(x, self.weight)

    block, x = Block(), torch.randn(4, 16, device=DEVICE)
    program = torch.export.export(block, (x,))
    assert "kpt_triton.norm_forward" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x.int(), w), "x is int32; supported: bfloat16"),
        (lambda x, w: (x, w[:3]), r"weight is of shape \(3,\); supported: shape \(8,\)"),
        (lambda x, w: (x, w.long()), "weight is int64"),
        (lambda x, w: (x, 2.0), "weight is a float; supported: a tensor"),
        (lambda x, w: (x[:, :0], w[:0]), "at least one column"),
        (lambda x, w: (x.to("meta"), w), "on device meta"),
    ],
)
def test_what_is_refused_is_named(change, message) -> None:
    x, weight = arguments("rms_norm", 4, 8)
    if "meta" in message and DEVICE == "cpu":
        pytest.skip("the interpreter takes every device")
    with pytest.raises(KernelInputError, match=message):
        norms.rms_norm(*change(x, weight))
