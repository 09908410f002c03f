"""The judge on an accelerator: its random states, its allocator, its streams."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kpt.judge.calls import Call, as_calls
from kpt.judge.clock import cache_flusher, paired, synchroniser
from kpt.judge.draws import InputSpec
from kpt.judge.kernels import inputs_like, judge_kernel
from kpt.judge.referee import judge
from kpt.judge.state import ModelState, untouched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


def device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, 0)


def test_the_devices_random_state_is_put_back() -> None:
    torch.manual_seed(1)
    torch.rand(1, device=device())
    torch.manual_seed(1)
    expected = torch.rand(5, device=device())
    torch.manual_seed(1)
    with untouched() as changes:
        torch.rand(9, device=device())
    assert f"random state of {device().type}" in changes.names and changes.stuck == []
    assert torch.equal(torch.rand(5, device=device()), expected)


def test_a_model_on_the_device_is_restored() -> None:
    model = torch.nn.BatchNorm1d(8, device=device())
    for limit in (None, 16):
        state = ModelState(model, limit_bytes=limit)
        assert state.differences() == []
        model(torch.randn(4, 8, device=device()))
        assert "running_mean: values" in state.differences()
        state.restore()
    assert ModelState(model).differences() == []


def test_draws_are_on_the_device_and_keep_strides() -> None:
    images = torch.randn(2, 3, 8, 8, device=device()).to(memory_format=torch.channels_last)
    spec = InputSpec.from_calls(as_calls({"images": images}), {"images": {0: "n"}})
    drawn = spec.draw(torch.Generator().manual_seed(0), sizes={"n": 5}).kwargs["images"]
    assert drawn.device == images.device and drawn.is_contiguous(memory_format=torch.channels_last)
    assert Call((images[:, :, ::2],)).clone().args[0].stride() == images[:, :, ::2].stride()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def honest(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def half_written(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = torch.empty_like(x)
    out[:-1] = honest(x, weight, eps)[:-1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_judged(dtype: torch.dtype) -> None:
    make = inputs_like(
        {"x": torch.randn(4, 8, 64, device=device()), "weight": torch.randn(64, device=device())}
    )
    verdict = judge_kernel(honest, rms_norm, make, backward=True, dtypes=[dtype])
    assert verdict.passed, verdict
    assert judge_kernel(half_written, rms_norm, make, dtypes=[dtype]).rule == "unwritten"
    wrong = judge_kernel(lambda x, weight: honest(x, weight) * 1.01, rms_norm, make, dtypes=[dtype])
    assert (wrong.passed, wrong.rule) == (False, "value")


def test_a_reference_on_the_host_judges_outputs_on_the_device() -> None:
    x = torch.randn(64, 64, dtype=torch.float64)
    eager = x.float().to(device()) @ x.float().to(device())
    assert judge(eager.clone(), x @ x, eager, level="exact")
    assert not judge(eager * 1.01, x @ x, eager, level="exact")


def test_work_on_a_side_stream_is_timed() -> None:
    x = torch.randn(4096, 4096, device=device())
    stream = torch.Stream(device())

    def hidden(y: torch.Tensor) -> None:
        with stream:
            for _ in range(8):
                x @ x

    def plain(y: torch.Tensor) -> None:
        x @ x

    timing = paired(
        plain, hidden, lambda: Call((x[:1],)), seconds=0.3, synchronize=synchroniser(device()),
        flush=cache_flusher(64, device()),
    )  # fmt: skip
    assert timing.high < 0.5
