"""Hostile kernels: each is rejected by the rule that catches it, and an honest one by none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kpt.judge.kernels import inputs_like, judge_kernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def honest(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def wrong_by_one_percent(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps) * 1.01


def wrong_epsilon(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, 1e-5)


def returns_nan(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = honest(x, weight, eps).clone()
    out.view(-1)[-1] = math.nan
    return out


def overflows(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = honest(x, weight, eps)
    return torch.where(x.abs().amax() > 8.0, out * math.inf, out)


def contiguous_only(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    flat = torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride())
    return honest(flat, weight, eps)


def aligned_only(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps) if x.storage_offset() % 4 == 0 else honest(x.roll(1, -1), weight, eps)


def refuses_strided(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    if not x.is_contiguous():
        raise RuntimeError("x must be contiguous")
    return honest(x, weight, eps)


def even_rows_only(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = honest(x, weight, eps).clone()
    if x.shape[-2] % 2:
        out[..., -1, :] = 0.0
    return out


def modifies_input(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = honest(x, weight, eps)
    x.data.view(-1)[0] += 1.0
    return out


def modifies_weight_and_puts_it_back(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    out = honest(x, weight.add_(1.0).sub_(1.0), eps)
    return out


def partly_unwritten(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = torch.empty_like(x)
    out[..., :-1] = honest(x, weight, eps)[..., :-1]
    return out


def wrong_shape(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps).unsqueeze(0)


def wrong_dtype(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps).double()


def wrong_structure(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Any:
    return (honest(x, weight, eps),)


def raises(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    raise RuntimeError("no such device")


class Replaying:
    """Returns the first answer forever."""

    def __init__(self) -> None:
        self.answers: dict[Any, torch.Tensor] = {}

    def key(self, x: torch.Tensor) -> Any:
        return tuple(x.shape)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        key = self.key(x)
        if key not in self.answers:
            self.answers[key] = honest(x, weight, eps)
        return self.answers[key]


class ReplayingByAddress(Replaying):
    def __init__(self) -> None:
        super().__init__()
        self.alive: list[torch.Tensor] = []

    def key(self, x: torch.Tensor) -> Any:
        self.alive.append(x)  # so that no other tensor gets its address
        return x.data_ptr(), tuple(x.shape), tuple(x.stride())


class Overwriting:
    """Writes every answer into one buffer."""

    def __init__(self) -> None:
        self.buffers: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        out = honest(x, weight, eps)
        return self.buffers.setdefault(tuple(x.shape), torch.zeros(x.shape)).copy_(out)


class RightForward(torch.autograd.Function):
    """Right values; the gradient of x ignores the normalisation's own derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return honest(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True))
        return grad * weight * scale, (grad * x * scale).flatten(0, -2).sum(0), None


class ContiguousGradient(torch.autograd.Function):
    """Right, unless the upstream gradient has other strides than the values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return honest(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad if grad.is_contiguous() else torch.zeros_like(grad)
        with torch.enable_grad():
            x, weight = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
            grads = torch.autograd.grad(honest(x, weight, ctx.eps), (x, weight), grad)
        return *grads, None


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return RightForward.apply(x, weight, eps)


def contiguous_gradient_only(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return ContiguousGradient.apply(x, weight, eps)


def no_gradient(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps).detach()


def random_sum(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return honest(x, weight, eps) * (1.0 + 1e-7 * torch.randint(0, 2, x.shape))


SEED = torch.Generator().manual_seed(0)
MAKE = inputs_like(
    {"x": torch.randn(2, 8, 16, generator=SEED), "weight": torch.randn(16, generator=SEED), "eps": 1e-6}
)


@pytest.mark.parametrize(
    ("kernel", "rule"),
    [
        (wrong_by_one_percent, "value"),
        (wrong_epsilon, "value"),
        (returns_nan, "nan"),
        (overflows, "nan"),
        (contiguous_only, "stride"),
        (aligned_only, "stride"),
        (refuses_strided, "stride"),
        (even_rows_only, "size"),
        (modifies_input, "input-modified"),
        (modifies_weight_and_puts_it_back, "input-modified"),
        (partly_unwritten, "unwritten"),
        (wrong_shape, "shape"),
        (wrong_dtype, "dtype"),
        (wrong_structure, "structure"),
        (raises, "error"),
        (Replaying(), "replay"),
        (ReplayingByAddress(), "replay"),
        (Overwriting(), "replay"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_a_hostile_kernel_is_rejected_by_its_rule(kernel: Callable[..., Any], rule: str) -> None:
    verdict = judge_kernel(kernel, rms_norm, MAKE)
    assert not verdict.passed
    assert verdict.rule == rule, verdict


@pytest.mark.parametrize("kernel", [wrong_gradient, contiguous_gradient_only, no_gradient])
def test_a_wrong_gradient_is_rejected_although_the_values_are_right(kernel: Callable[..., Any]) -> None:
    assert judge_kernel(kernel, rms_norm, MAKE).passed
    verdict = judge_kernel(kernel, rms_norm, MAKE, backward=True)
    assert (verdict.passed, verdict.rule) == (False, "gradient"), verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_honest_kernel_passes_every_probe(dtype: torch.dtype) -> None:
    verdict = judge_kernel(honest, rms_norm, MAKE, backward=True, dtypes=[dtype], reproducible=True)
    assert verdict.passed, verdict
    assert verdict.figures["probes"] >= 15


def test_what_was_judged_on_ordinary_inputs_is_looked_at_for_the_rest_alone() -> None:
    seen: list[int] = []

    def large_only(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        seen.append(x.shape[-2])
        return honest(x, weight, eps) * (1.0 if x.shape[-2] == 33 else 1.01)

    rest: dict[str, Any] = {"ordinary": False, "layouts": (), "scales": ()}
    assert judge_kernel(large_only, rms_norm, MAKE, rows=(33,), **rest).passed and seen == [33]
    assert judge_kernel(large_only, rms_norm, MAKE, rows=(33, 7), **rest).rule == "size"
    assert judge_kernel(large_only, rms_norm, MAKE, rows=(33,), **{**rest, "ordinary": True}).rule == "value"


def test_a_promise_of_reproducible_results_is_checked() -> None:
    verdict = judge_kernel(random_sum, rms_norm, MAKE, reproducible=True, level="exact")
    assert verdict.rule == "nondeterministic"


def bf16_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype)


def test_a_kernel_that_drops_to_bf16_needs_the_production_level() -> None:
    make = inputs_like({"x": torch.randn(2, 8, 32), "weight": torch.randn(16, 32)})
    assert judge_kernel(bf16_linear, F.linear, make, level="exact").rule == "value"
    verdict = judge_kernel(bf16_linear, F.linear, make, level="production", compute_dtype="bfloat16")
    assert verdict.passed, verdict


def test_packed_weights_are_passed_on_untouched() -> None:
    weight = torch.randn(16, 32)
    packed = weight.t().contiguous()

    def kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ packed

    make = inputs_like({"x": torch.randn(2, 8, 32), "weight": weight}, fixed=("weight",))
    verdict = judge_kernel(kernel, F.linear, make, fixed=("weight",))
    assert verdict.passed, verdict


class PacksByAddress:
    """Packs a weight when it first sees it, and never looks again."""

    def __init__(self) -> None:
        self.packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        _, packed = self.packed.setdefault(weight.data_ptr(), (weight, weight.t().contiguous()))
        return x @ packed


def test_a_kernel_that_packs_for_itself_has_to_follow_new_weights() -> None:
    arguments = {"x": torch.randn(9, 12), "weight": torch.randn(5, 12)}
    make = inputs_like(arguments, fixed=("weight",))

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.t()

    kept: dict[str, Any] = {"fixed": ("weight",), "changing": ("weight",)}
    assert judge_kernel(linear, linear, make, **kept)
    found = judge_kernel(PacksByAddress(), linear, make, **kept)
    assert found.rule == "replay" and "new weights" in found.detail
    assert judge_kernel(PacksByAddress(), linear, make, fixed=("weight",))  # packed on purpose


def test_probes_of_scales_and_layouts_take_few_rows_where_there_are_many() -> None:
    seen: list[int] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return x * 2

    assert judge_kernel(doubled, lambda x: x * 2, inputs_like({"x": torch.randn(400, 8)}), few=61)
    assert seen.count(400) >= 6  # values, unwritten memory, replays
    assert seen.count(61) >= 7  # two scales, five layouts
    assert {1, 7, 33} < set(seen)


def test_multiple_outputs_and_views_of_inputs_are_judged() -> None:
    def add(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total * 2.0, total

    def aliasing(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return total.mul(2.0), x.detach() if torch.equal(total, x) else total

    def view(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x + residual) * 2.0, x

    make = inputs_like({"x": torch.randn(3, 8), "residual": torch.randn(3, 8)})
    assert judge_kernel(add, add, make, backward=True).passed
    assert judge_kernel(aliasing, add, make).passed
    assert judge_kernel(view, add, make).rule in ("value", "structure")


def test_arguments_that_the_reference_cannot_run_are_an_error() -> None:
    make = inputs_like({"x": torch.randn(2, 8, 32), "weight": torch.randn(16, 31)})
    with pytest.raises(ValueError, match="reference cannot run"):
        judge_kernel(F.linear, F.linear, make)


def natively(name: str) -> Callable[..., Any]:
    """torch's own implementation of an op, which differs from the reference in its roundings only."""
    return {
        "layer_norm": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        "attention": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "masked": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "cross_entropy": lambda logits, target: F.cross_entropy(logits, target),
    }[name]


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return (normed * weight + bias).to(x.dtype)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    mask = torch.full((q.shape[2], k.shape[2]), -1e4, dtype=q.dtype).triu(1)
    return masked(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), mask)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -wide.log_softmax(-1).gather(-1, target[:, None]).mean().to(logits.dtype)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


OPS: dict[str, tuple[Callable[..., Any], dict[str, torch.Tensor]]] = {
    "layer_norm": (layer_norm, {"x": drawn(2, 8, 64), "weight": drawn(64), "bias": drawn(64)}),
    "attention": (attention, {"q": drawn(2, 4, 8, 16), "k": drawn(2, 2, 8, 16), "v": drawn(2, 2, 8, 16)}),
    "masked": (
        masked,
        {name: drawn(2, 3, 8, 16) for name in "qkv"} | {"mask": torch.full((8, 8), -1e4).triu(1)},
    ),
    "cross_entropy": (cross_entropy, {"logits": drawn(16, 50), "target": torch.arange(16) * 3 % 50}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_torchs_own_kernels_pass_whatever_is_drawn(name: str, dtype: torch.dtype) -> None:
    reference, arguments = OPS[name]
    for seed in range(2):
        verdict = judge_kernel(
            natively(name), reference, inputs_like(arguments), backward=True, dtypes=[dtype], seed=seed
        )
        assert verdict.passed, verdict
        assert verdict.figures["probes"] >= 22  # no probe was dropped: every size and layout could be run


def test_sizes_and_dimensions_vary_with_the_rows() -> None:
    make = inputs_like({"x": torch.randn(2, 8, 16), "weight": torch.randn(16)})
    generator = torch.Generator().manual_seed(0)
    assert make(generator, None)["x"].shape == (2, 8, 16)
    assert make(generator, 7)["x"].shape == (2, 7, 16)
    assert make(generator, 1)["x"].shape == (1, 1, 16)
    assert make(generator, 7)["weight"].shape == (16,)


def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def square_in_half(x: torch.Tensor) -> torch.Tensor:
    return (x.half() * x.half()).float()


def square_of_large_in_half(x: torch.Tensor) -> torch.Tensor:
    """Infinite where fp16 would do."""
    return torch.where(x.abs().amax() > 600.0, torch.inf, square_in_half(x))


def test_what_overflows_in_the_dtype_that_a_kernel_computes_in_may_overflow_in_it() -> None:
    inputs = inputs_like({"x": torch.randn(4, 64)})
    options: Any = {"level": "production", "rows": (1, 33)}
    assert judge_kernel(square_in_half, square, inputs, compute_dtype="float16", **options)
    found = judge_kernel(square_of_large_in_half, square, inputs, compute_dtype="float16", **options)
    assert found.rule == "nan" and "scaled by 300" in found.detail
    assert judge_kernel(square_in_half, square, inputs, compute_dtype="bfloat16", **options).rule == "nan"
