"""What this plugin offers. Only names: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable

import kpt
from kpt.specs import KernelSpec, PassSpec


# --8<-- [start:kernels]
@kpt.hookimpl
def kpt_kernels() -> Iterable[KernelSpec]:
    yield KernelSpec(
        op="rms_norm",
        name="tutorial.rms_norm",
        entry="kpt_plugin_tutorial.kernels:rms_norm",
        supports="kpt_plugin_tutorial.kernels:supports",
        dtypes=("float32", "bfloat16"),
        backward=True,
        compile_safe=True,
        reproducible=True,
        predicted_gain=1.1,
        source="torch.nn.functional.rms_norm",
    )


# --8<-- [end:kernels]


# --8<-- [start:passes]
@kpt.hookimpl
def kpt_passes() -> Iterable[PassSpec]:
    yield PassSpec(
        name="tutorial.fold_batch_norm",
        phase="layout",
        entry="kpt_plugin_tutorial.folding:FoldBatchNorm",
        level="exact",
        modes=("inference",),
        summary="Folds a batch norm into the convolution before it.",
    )


# --8<-- [end:passes]
