"""The hooks of this plugin. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from kpt import hookimpl
from kpt.specs import PassSpec


@hookimpl
def kpt_passes() -> Iterator[PassSpec]:
    yield PassSpec(
        "openvino",
        "compile",
        "kpt_plugin_openvino.whole:OpenVino",
        hardware=("cpu",),
        # It has operations of its own for these, and none for what kernels and policies register.
        conflicts=("kernel:linear", "kernel:attention", "int8"),
        summary="the forward by OpenVINO, weights frozen into it",
    )
