"""What tuning chooses; timing itself needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton import tuner, tuning


@pytest.fixture
def kernel() -> Iterator[tuning.Tuned]:
    made = tuning.Tuned(
        "made_up",
        ("columns",),
        lambda *sizes: {"SPEED": 1},
        lambda *sizes: iter([{"SPEED": 2}, {"SPEED": 4}]),
    )
    yield made
    del tuning.KERNELS["made_up"]


@pytest.mark.parametrize("wrong", [0.5, float("nan"), None])
def test_the_fastest_options_are_not_taken_if_their_values_are_others(
    wrong: float | None, kernel: tuning.Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factor of two, NaN; where all agree, the fastest win."""

    def prepare(dtype: torch.dtype, columns: int):
        def with_options(options):
            def call():
                out = torch.ones(columns, dtype=dtype)
                return out * wrong if options["SPEED"] == 4 and wrong is not None else out, None

            call.speed = options["SPEED"]
            return call

        return with_options

    monkeypatch.setattr(tuner, "_milliseconds", lambda call, seconds: 1.0 / call.speed)
    told: list[str] = []
    work = tuner.Workload(kernel, ((8,),), prepare)
    (row,) = tuner._tune_one(work, torch.float32, (8,), 0.1, told.append)
    assert row["options"] == {"SPEED": 4 if wrong is None else 2}
    assert any("gives other values" in line for line in told) == (wrong is not None)
