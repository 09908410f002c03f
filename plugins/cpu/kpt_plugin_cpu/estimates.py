"""Predicted gains, from measured rates and what was observed of the model.

A call's eager time is split into matrix products (operations / the rate of eager's library) and the
rest: elementwise work, normalisation, softmax and dispatch. A variant changes the rate of the one and
the memory traffic of the other. These are estimates that order trials; the clock decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation

#: Share of the rest that is left when a compiler fuses it, which removes most passes over memory.
FUSED = 0.5
#: The rate of fp32 products by oneDNN; "float32" is that of the library which eager calls.
ONEDNN = "float32:onednn"
#: The same by MKL with packed weights, as inductor packs them for a known number of rows.
MKL = "float32:mkl"
#: Share of the rest that is left in bfloat16, which moves half the bytes.
_HALVED = 0.8
#: How much faster packed weights are at least, for a plan that packs them.
_PAYS = 1.1
#: What is said after a dtype for the rate of its products with weights packed for oneDNN.
PACKED = ":onednn"
#: Seconds: a Zen 4 took 12 to 14 for BERT-base, 10 for ResNet-50 (about a hundred modules each), 18 to 24 for
#: half as many with a dynamic batch, and 8 to 16 for models of two layers.
_COMPILE, _COMPILE_PER_MODULE = 5.0, 0.1
#: Share of what a call does besides products that padding costs even where its tokens are left out:
#: attention, and moving tokens.
_UNPACKED = 0.25
#: Seconds that a module's call and the Python in its forward take, about.
PER_MODULE = 40e-6
#: Share of a module's seconds that capturing takes: a decoder of 30 layers took 8 s of 50 with one compiled.
_CAPTURE = 0.15


@dataclass(frozen=True)
class Estimate:
    """Seconds of one eager call: ``products`` in matrix products, ``rest`` in everything else."""

    products: float
    rest: float

    @property
    def total(self) -> float:
        return self.products + self.rest

    def gain(self, *, rate_ratio: float = 1.0, rest_ratio: float = 1.0) -> float:
        """Eager time over the time with products ``rate_ratio`` faster and the rest cut to ``rest_ratio``."""
        after = self.products / max(rate_ratio, 1e-3) + self.rest * rest_ratio
        return self.total / after if after > 0 else 1.0


def estimate(observation: Observation, hardware: HardwareProfile) -> Estimate:
    """The split of one eager call."""
    total = observation.baseline_seconds or 1e-3
    products = _product_seconds(observation, hardware.matmul_rates.get("float32", 0.0))
    # Rates are measured at one size; small or skinny products run below them.
    products = min(products, 0.95 * total)
    return Estimate(products, total - products)


def _product_seconds(observation: Observation, rate: float) -> float:
    """Seconds of one call in products at ``rate``; half of it where that or the operations are not known."""
    if rate and observation.operations:
        return observation.operations / rate
    return 0.5 * (observation.baseline_seconds or 1e-3)


def rate_ratio(hardware: HardwareProfile, name: str) -> float:
    """How much faster than eager's fp32 the products called ``name`` are; 1.0 where not measured."""
    rate, eager = hardware.matmul_rates.get(name, 0.0), hardware.matmul_rates.get("float32", 0.0)
    return rate / eager if rate and eager else 1.0


def gain_of_dtype(
    observation: Observation, hardware: HardwareProfile, dtype: str, *, rest: str = "bfloat16"
) -> float:
    """The gain of doing products in ``dtype``, and all else in ``rest``.

    A rest in bfloat16 moves half the bytes; one in float32 takes as long as before. In inference weights in
    bfloat16 may be packed, as those in int8 are.
    """
    faster = rate_ratio(hardware, dtype)
    if hardware.matmul_rates.get(dtype + PACKED) and not observation.training:
        faster = max(faster, rate_ratio(hardware, dtype + PACKED))
    return estimate(observation, hardware).gain(
        rate_ratio=faster, rest_ratio=1.0 if rest == "float32" else _HALVED
    )


def gain_of_packing(observation: Observation, hardware: HardwareProfile) -> float:
    """The gain of bfloat16 weights packed for oneDNN over such weights as they are.

    1.0 where rates are not measured, or the model is not in bfloat16 and its level does not allow that. Of a
    model that a policy has to cast first it is a small one: the prediction of that has the rest.
    """
    plain, packed = (rate_ratio(hardware, name) for name in ("bfloat16", "bfloat16" + PACKED))
    measured = all(hardware.matmul_rates.get(name) for name in ("bfloat16", "bfloat16" + PACKED))
    if not measured or packed < _PAYS * plain:
        return 1.0
    if in_bfloat16(observation):
        total = observation.baseline_seconds or 1e-3
        products = min(_product_seconds(observation, hardware.matmul_rates["bfloat16"]), 0.95 * total)
        return total / (total - products + products * plain / packed)
    allowed = observation.level != "exact" and "bfloat16" in hardware.native_dtypes
    return _PAYS if allowed else 1.0


def in_bfloat16(observation: Observation) -> bool:
    """Whether most of the model's parameters are in bfloat16; norms may be in fp32."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in observation.model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return 2 * sizes.get(torch.bfloat16, 0) > sum(sizes.values())


def matmul_seconds(observation: Observation, hardware: HardwareProfile, dtype: str) -> float:
    """Seconds of one call's products in ``dtype``."""
    return estimate(observation, hardware).products / rate_ratio(hardware, dtype)


def seconds_per_module(observation: Observation) -> float:
    """Seconds of one eager call that Python takes, between the operations."""
    return PER_MODULE * sum(1 for _ in observation.model.modules())


def fixed_seconds(observation: Observation, hardware: HardwareProfile) -> float:
    """Seconds of one eager call that another one would take whatever its size, nine tenths of it at most.

    Python runs between the operations, and weights are read from memory; tables of embeddings are not.
    """
    read = sum(
        parameter.numel() * parameter.element_size()
        for module in observation.model.modules()
        for parameter in module.parameters(recurse=False)
        if not isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
    )
    seconds = seconds_per_module(observation) + read / max(hardware.bandwidth, 1e9)
    return min(seconds, 0.9 * observation.baseline_seconds)


def without_padding(observation: Observation, hardware: HardwareProfile, share: float) -> float:
    """The gain where the ``share`` of the positions that is padding is left out of all but attention."""
    found = estimate(observation, hardware)
    fixed = min(fixed_seconds(observation, hardware), found.total)
    rest = found.rest * (_UNPACKED + (1.0 - _UNPACKED) * (1.0 - share))
    return max(1.0, found.total / max(found.products * (1.0 - share) + rest, fixed))


def modules_with_work(observation: Observation) -> int:
    """Modules that hold parameters themselves: a measure of how long a model takes to compile."""
    return sum(
        1 for module in observation.model.modules() if next(module.parameters(False), None) is not None
    )


def compile_seconds(observation: Observation, repeated: float = 0.0) -> float:
    """Seconds to compile the model: a part of its own, and one for each module with parameters.

    A share of the modules that is ``repeated`` is captured and not compiled. Where the batch is dynamic, one
    of a single row is a graph of its own.
    """
    spec = observation.spec
    batches = {leaf.dims[0] for leaf in spec.leaves if 0 in leaf.dims}
    graphs = 2 if any(spec.dimensions[name].low <= 1 for name in batches) else 1
    modules = modules_with_work(observation) * (1.0 - (1.0 - _CAPTURE) * repeated)
    return graphs * (_COMPILE + _COMPILE_PER_MODULE * modules)
