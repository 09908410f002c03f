"""From a captured graph to a function that OpenVINO computes.

TorchScript is how torch hands graphs to OpenVINO's PyTorch frontend. The frontend is called directly: the
conversion API around it reports its use to OpenVINO's makers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kpt_plugin_cpu.torchscript import Frozen, traced
from kpt_plugin_openvino.requests import Requests

#: Axes of each input that have any size: {position: {axis, ...}}.
Free = Mapping[int, set[int]]


def lower(
    graph: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    own: set[int] | frozenset[int] = frozenset(),
    config: Mapping[str, Any],
) -> Callable[..., list[torch.Tensor]]:
    """A dynamo backend: ``graph`` converted and compiled by OpenVINO for the CPU with ``config``.

    Inputs whose identity is in ``own``, a model's weights, are frozen into it. Axes that dynamo holds
    symbolic may have any size. Products are in bfloat16 where weights are, else in float32.

    Raises:
        TypeError: an input or an output is no tensor, or of a dtype that OpenVINO has no counterpart of.
        RuntimeError: OpenVINO can't convert an operation; the message is its own.
    """
    # OpenVINO reads weights where they lie, and counts nobody's references to them.
    fixed = {i: value.detach().contiguous() for i, value in enumerate(example_inputs) if id(value) in own}
    sizes, free = _symbolic(graph, fixed)
    places = [i for i in range(len(example_inputs)) if i not in fixed and i not in sizes]
    for index in places:
        _check(f"input {index}", example_inputs[index])
    inputs = tuple(example_inputs[i] for i in places)
    frozen = Frozen(graph, fixed, len(example_inputs), sizes)
    with torch.no_grad():
        expected = _tensors(frozen(*inputs))
    shapes = [_shape(value, free.get(place, set())) for place, value in zip(places, inputs)]
    half = any(value.dtype is torch.bfloat16 for value in fixed.values())
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
    compiled = _compiled(traced(frozen, inputs), inputs, shapes, {**precision, **config})
    requests = Requests(compiled, inputs, expected, bool(free), kept=tuple(fixed.values()))

    def call(*args: Any) -> list[torch.Tensor]:
        return requests([args[index] for index in places])

    return call


def _compiled(
    script: torch.jit.ScriptModule,
    inputs: tuple[torch.Tensor, ...],
    shapes: list[list[int]],
    config: Mapping[str, Any],
) -> Any:
    """``script`` compiled by OpenVINO, which has no inputs but ``inputs``, of ``shapes`` (-1: any)."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(script, example_input=inputs)  # asked until the conversion ends
    try:
        model = frontend.convert(frontend.load(decoder))
        places = model.inputs
        if len(places) != len(inputs):
            raise RuntimeError(f"it found {len(places)} inputs in a graph of {len(inputs)}")
        model.reshape({place: openvino.PartialShape(shape) for place, shape in zip(places, shapes)})
        return openvino.Core().compile_model(model, "CPU", dict(config))
    except Exception as error:  # its versions differ in what is a RuntimeError
        raise RuntimeError(f"OpenVINO can't compile the graph: {_summary(str(error))}") from error


def _summary(message: str) -> str:
    """What OpenVINO's report says in the end, in one line: it begins with where in its sources it was."""
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
        _check(f"output {number}", output)
    return outputs


def _check(what: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what} of the graph is of type {type(value).__name__}; OpenVINO takes tensors")
    if value.is_complex():
        raise TypeError(f"{what} of the graph is a tensor of {value.dtype}, which OpenVINO has not")
