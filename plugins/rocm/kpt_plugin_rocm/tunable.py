"""Let rocBLAS and hipBLASLt try every solution for the products of this model, once each.

torch's TunableOp times the libraries' solutions at the first call of each shape. While a plan is warmed
up tuning is on; afterwards the chosen solutions are used and shapes that were never seen run as before.
The switches belong to the process: they are put back when the variant is undone. What was chosen stays known
to the process, and nothing asks for it while TunableOp is off.

TunableOp appends what it finds to a file in the working directory. A trial must leave no trace, so that the
file is the null device until the variant is undone.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from kpt.specs import Skip, Undo, Variant


class TunableGemm:
    """A `Pass` for AMD GPUs only: on others the libraries choose well by themselves."""

    def __init__(self) -> None:
        self._before = 0

    def propose(self, observation: Any, hardware: Any) -> list[Variant | Skip]:
        if hardware.vendor != "amd":
            return [Skip("the device is not AMD's")]
        if not hasattr(torch.cuda, "tunable"):
            return [Skip("this torch has no TunableOp")]
        if torch.cuda.tunable.is_enabled():
            return [Skip("TunableOp is on already; its settings are left alone")]
        return [
            Variant(
                "tunable-gemm",
                predicted_gain=1.08,
                setup_seconds=20.0,
                note="turns torch's TunableOp on for this process while the plan is in use",
            )
        ]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        tunable = torch.cuda.tunable
        held = (tunable.is_enabled(), tunable.tuning_is_enabled(), tunable.record_untuned_is_enabled())
        # Asking for results reads the user's file once, and settles its name where none was given.
        self._before = len(tunable.get_results())
        filename = tunable.get_filename()
        tunable.set_filename(os.devnull)
        tunable.enable(True)
        tunable.tuning_enable(True)

        def undo() -> None:
            enabled, tuning, recording = held
            tunable.tuning_enable(tuning)
            tunable.record_untuned_enable(recording)
            tunable.enable(enabled)
            tunable.set_filename(filename)

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        """Whether any product was tuned since; ends tuning, since the model has been warmed up by now."""
        torch.cuda.tunable.tuning_enable(False)
        return len(torch.cuda.tunable.get_results()) > self._before
