"""Whole graphs by oneDNN Graph: products with what follows them, prepared once and run without a look-up.

Called through torch, each product of oneDNN is described, looked up and given its memory anew, which took 12
to 19 us of a Zen 5 core and up to 40 with cold caches. oneDNN Graph compiles partitions once; TorchScript is
how torch hands graphs to it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kpt.compiling import CompiledForward
from kpt.specs import Skip, Variant, replace_forward
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.multihead import written_out
from kpt_plugin_cpu.torchscript import Frozen, traced

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo

#: Runs until TorchScript's executor has seen the inputs and optimised for them.
_WARM_UP = 3
#: Seconds that one product spends in torch and in oneDNN's set-up, and not here.
_BETWEEN = 15e-6
#: Bytes of weights up to which it is tried: some of the packed copies stay in oneDNN's cache after an undo.
_LARGEST = 256 << 20
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@contextmanager
def _fusion() -> Iterator[None]:
    """oneDNN Graph's passes while TorchScript optimises; the switch is the process's and is put back."""
    before = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(True)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(before)


def lower(
    graph: torch.fx.GraphModule, example_inputs: list[Any], own: set[int] | frozenset[int] = frozenset()
) -> Callable[..., Any]:
    """A dynamo backend: ``graph`` traced, optimised for the inputs' sizes.

    Inputs whose identity is in ``own``, a model's weights, are frozen into it.

    Raises:
        RuntimeError: no part of the graph was given to oneDNN Graph.
    """
    fixed = {index: value for index, value in enumerate(example_inputs) if id(value) in own}
    places = [index for index in range(len(example_inputs)) if index not in fixed]
    inputs = tuple(example_inputs[index] for index in places)
    with torch.no_grad(), _fusion(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        frozen = torch.jit.freeze(traced(Frozen(graph, fixed, len(example_inputs)), inputs))
        run = frozen.forward  # without a module's hooks around it
        for _ in range(_WARM_UP):
            run(*inputs)
        optimised = str(torch.jit.last_executed_optimized_graph())
    if "oneDNNFusion" not in optimised:
        raise RuntimeError("oneDNN Graph took no part of the model")

    def call(*args: Any) -> Any:
        return run(*[args[index] for index in places])

    return call


class OnednnGraph:
    """Replaces the root's forward by the graph that dynamo captured, run by TorchScript and oneDNN Graph."""

    def __init__(self) -> None:
        self.compiled: CompiledForward | None = None

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        modules = list(observation.model.modules())
        linears = sum(isinstance(module, torch.nn.Linear) for module in modules)
        convolutions = sum(isinstance(module, _CONVOLUTIONS) for module in modules)
        products = linears + convolutions
        if not hasattr(torch.jit, "enable_onednn_fusion") or not torch.backends.mkldnn.is_available():
            yield Skip("this torch has no oneDNN Graph")
        elif observation.dynamic:
            yield Skip("oneDNN Graph compiles for one size, and sizes are declared dynamic")
        elif not products:
            yield Skip("the model has no linear layer and no convolution")
        elif not observation.parameter_dtypes & {"float32", *({"bfloat16"} & {*hardware.native_dtypes})}:
            dtypes = ", ".join(sorted(observation.parameter_dtypes))
            yield Skip(f"oneDNN Graph has no products on this CPU for weights that are {dtypes}")
        elif observation.parameter_bytes > _LARGEST:
            size = observation.parameter_bytes >> 20
            yield Skip(
                f"oneDNN would keep packed copies of {size} MiB of weights for the life of the process"
            )
        else:
            estimate = estimates.estimate(observation, hardware)
            faster = max(estimates.rate_ratio(hardware, estimates.ONEDNN), 1.0)
            # Folded norms, activations and sums become part of the product before them, which is all that
            # stands between convolutions. Layer norms and softmax, between linears, run one by one.
            rest = 0.9 * estimates.FUSED if convolutions > linears else 0.9
            alone = estimate.gain(rate_ratio=faster, rest_ratio=rest)
            between = min(products * _BETWEEN, 0.3 * estimate.total / alone)
            yield Variant(
                "frozen",
                predicted_gain=estimate.total / (estimate.total / alone - between),
                setup_seconds=0.3 * estimates.compile_seconds(observation),
                derives=True,
                reproducible=True,
            )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        backend = functools.partial(lower, own=own)
        compiled = CompiledForward(
            model.forward, backend=backend, graph_pass=written_out, label=type(model).__name__
        )
        self.compiled = compiled
        put_back = replace_forward(model, compiled)

        def undo() -> None:
            put_back()
            compiled.dispose()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.compiled is not None and bool(self.compiled.graphs and self.compiled.executions)
