"""From a captured graph to a function that OpenVINO computes.

TorchScript is how torch hands graphs to OpenVINO's PyTorch frontend. The frontend is called directly: the
conversion API around it reports its use to OpenVINO's makers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from kpt_plugin_openvino.requests import Requests

#: Axes of each input that have any size: {position: {axis, ...}}.
Free = Mapping[int, set[int]]


class _Frozen(torch.nn.Module):
    """A captured graph whose inputs are tensors only.

    Its weights are set as attributes; sizes, which dynamo passes as numbers, are read off the tensors.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        fixed: Mapping[int, torch.Tensor],
        sizes: Mapping[int, tuple[int, int]],
        count: int,
    ) -> None:
        super().__init__()
        self.graph_module = graph
        self.fixed, self.sizes, self.count = fixed, sizes, count
        for index, tensor in fixed.items():
            self.register_buffer(f"fixed_{index}", tensor.detach())

    def forward(self, *inputs: torch.Tensor) -> Any:
        given: Iterator[torch.Tensor] = iter(inputs)
        values: dict[int, Any] = {
            index: getattr(self, f"fixed_{index}") if index in self.fixed else next(given)
            for index in range(self.count)
            if index not in self.sizes
        }
        values |= {index: values[source].shape[axis] for index, (source, axis) in self.sizes.items()}
        return self.graph_module(*(values[index] for index in range(self.count)))


def lower(
    graph: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    own: set[int] | frozenset[int] = frozenset(),
    config: Mapping[str, Any],
) -> Callable[..., list[torch.Tensor]]:
    """A dynamo backend: ``graph`` converted and compiled by OpenVINO for the CPU with ``config``.

    Inputs whose identity is in ``own``, a model's weights, are frozen into it. Axes that dynamo holds
    symbolic may have any size.

    Raises:
        TypeError: an input or an output is no tensor, or of a dtype that OpenVINO has no counterpart of.
        RuntimeError: OpenVINO can't convert an operation; the message is its own.
    """
    fixed = {i: value for i, value in enumerate(example_inputs) if id(value) in own}
    sizes, free = _symbolic(graph, fixed)
    places = [i for i in range(len(example_inputs)) if i not in fixed and i not in sizes]
    for index in places:
        if not isinstance(example_inputs[index], torch.Tensor):
            kind = type(example_inputs[index]).__name__
            raise TypeError(f"input {index} of the graph is a {kind}; OpenVINO takes tensors")
    inputs = tuple(example_inputs[i] for i in places)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of every branch
        frozen = _Frozen(graph, fixed, sizes, len(example_inputs)).eval()
        expected = frozen(*inputs)
        traced = torch.jit.trace(frozen, inputs, check_trace=False, strict=False).eval()
        shapes = [_shape(value, free.get(place, set())) for place, value in zip(places, inputs)]
        requests = Requests(_compiled(traced, inputs, shapes, config), inputs, _tensors(expected), bool(free))

    def call(*args: Any) -> list[torch.Tensor]:
        return requests([args[index] for index in places])

    return call


def _compiled(
    traced: torch.jit.ScriptModule,
    inputs: tuple[torch.Tensor, ...],
    shapes: list[list[int]],
    config: Mapping[str, Any],
) -> Any:
    """The traced graph compiled by OpenVINO, which has no inputs but ``inputs``, of ``shapes`` (-1: any)."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=inputs)  # asked until the conversion ends
    try:
        model = frontend.convert(frontend.load(decoder))
    except Exception as error:  # what is derived from RuntimeError differs between its versions
        raise RuntimeError(f"OpenVINO can't convert the graph: {_summary(str(error))}") from error
    places = model.inputs
    if len(places) != len(inputs):
        raise RuntimeError(f"OpenVINO found {len(places)} inputs in a graph of {len(inputs)}")
    model.reshape({place: openvino.PartialShape(shape) for place, shape in zip(places, shapes)})
    return openvino.Core().compile_model(model, "CPU", dict(config))


def _summary(message: str) -> str:
    """What OpenVINO's report of a conversion says in the end, in one line."""
    lines = [line.strip(" -") for line in message.strip().splitlines()]
    start = lines.index("Summary:") + 1 if "Summary:" in lines else len(lines) - 1
    return "; ".join(line for line in lines[start:] if line)


def _symbolic(
    graph: torch.fx.GraphModule, fixed: Mapping[int, torch.Tensor]
) -> tuple[dict[int, tuple[int, int]], Free]:
    """Which inputs are sizes, as the (input, axis) that has them, and the axes of each tensor that are free.

    Raises:
        TypeError: a size is that of no axis.
    """
    sizes: dict[int, tuple[int, int]] = {}
    free: dict[int, set[int]] = {}
    axes: dict[str, tuple[int, int]] = {}
    values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and index not in fixed:
            for axis, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    axes.setdefault(str(size.node.expr), (index, axis))
                    free.setdefault(index, set()).add(axis)
    for index, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            place = axes.get(str(value.node.expr))
            if place is None:
                raise TypeError(f"input {index} of the graph is a number that is no size of a tensor")
            sizes[index] = place
    return sizes, free


def _shape(value: torch.Tensor, free: set[int]) -> list[int]:
    return [-1 if axis in free else size for axis, size in enumerate(value.shape)]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The outputs of the graph; a TypeError where one is something else."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    for number, output in enumerate(outputs):
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"output {number} of the graph is a {type(output).__name__}; OpenVINO makes tensors"
            )
    return outputs
