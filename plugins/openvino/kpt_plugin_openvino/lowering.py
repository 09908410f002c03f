"""From a captured graph to a function that OpenVINO computes.

TorchScript is how torch hands graphs to OpenVINO's PyTorch frontend. The frontend is called directly: the
conversion API around it reports its use to OpenVINO's makers.
"""

from __future__ import annotations

import functools
import operator
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kpt_plugin_cpu.torchscript import Frozen, traced
from kpt_plugin_openvino.requests import Requests
from kpt_plugin_openvino.widening import widened

#: Axes of each input that have any size: {position: {axis, ...}}.
Free = Mapping[int, set[int]]
_NO_CONFIG: Mapping[str, Any] = {}
#: OpenVINO's CPUs compute integers in 32 bits.
_INTEGERS = torch.iinfo(torch.int32)
_UNKNOWN = (torch.float64, torch.complex64, torch.complex128, torch.complex32)


def lower(
    graph: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    own: set[int] | frozenset[int] = frozenset(),
    config: Mapping[str, Any] = _NO_CONFIG,
) -> Callable[..., list[torch.Tensor]]:
    """A dynamo backend: ``graph`` converted and compiled by OpenVINO for the CPU.

    Inputs whose identity is in ``own``, a model's weights, are frozen into it. Axes that dynamo holds
    symbolic may have any size. Products are in bfloat16 where most weights are, else in float32, by as many
    threads as torch uses; ``config`` overrides OpenVINO's properties. A graph of convolutions in bfloat16 is
    handed over in float32: only there OpenVINO folds norms and sums into them. Calls with integers of more
    than 32 bits run the captured graph itself.

    Raises:
        TypeError: an input or an output is no tensor, or something is in a dtype that OpenVINO has not.
        RuntimeError: OpenVINO can't compile the graph; the message is its own.
    """
    # As they lie OpenVINO reads them; what it would have to copy first, it does not keep alive in bfloat16.
    fixed = {i: value.detach().contiguous() for i, value in enumerate(example_inputs) if id(value) in own}
    sizes, free = _symbolic(graph, fixed)
    places = [i for i in range(len(example_inputs)) if i not in fixed and i not in sizes]
    for index in places:
        _check(f"input {index}", example_inputs[index])
    for node in graph.graph.nodes:
        if isinstance(value := node.meta.get("example_value"), torch.Tensor):
            _check(f"{node.name}", value)
    inputs = tuple(example_inputs[i] for i in places)
    frozen = Frozen(graph, fixed, len(example_inputs), sizes).eval()
    with torch.no_grad():
        expected = _tensors(frozen(*inputs))
    shapes = [_shape(value, free.get(place, set())) for place, value in zip(places, inputs)]
    narrow = _in_bfloat16(fixed.values())
    wide = widened(graph, fixed) if narrow and _convolves(fixed.values()) else None
    handed = frozen
    if wide is not None:
        graph, weights = wide
        handed = Frozen(graph, weights, len(example_inputs), sizes).eval()
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # to cores, which other threads of the process share
        **config,
    }
    script = traced(handed, inputs)
    compiled = _compiled(script, inputs, shapes, properties, shared=_as_they_lie(graph))
    requests = Requests(compiled, inputs, expected, kept=script)
    long = [number for number, value in enumerate(inputs) if value.dtype is torch.int64]

    def call(*args: Any) -> list[torch.Tensor]:
        given = [args[index] for index in places]
        if any(_needs_64_bits(given[number]) for number in long):
            with torch.no_grad():
                return _tensors(frozen(*given))
        return requests(given)

    return call


@functools.cache
def _core() -> Any:
    """OpenVINO's entry, one for the life of the process.

    Each gives the thread that makes it another stack for signals, and takes it back when it goes. Two that go
    in the order in which they came leave one that is gone, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def _compiled(
    script: torch.jit.ScriptModule,
    inputs: tuple[torch.Tensor, ...],
    shapes: list[list[int]],
    properties: Mapping[str, Any],
    *,
    shared: bool,
) -> Any:
    """``script`` compiled by OpenVINO, which has no inputs but ``inputs``, of ``shapes`` (-1: any).

    Where memory is ``shared`` its constants have to live as long as what is made.
    """
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(script, example_input=inputs, shared_memory=shared)
    try:
        with _interrupted_later():
            model = frontend.convert(frontend.load(decoder))
        places = model.inputs
        if len(places) != len(inputs):
            raise RuntimeError(f"it found {len(places)} inputs in a graph of {len(inputs)}")
        model.reshape({place: openvino.PartialShape(shape) for place, shape in zip(places, shapes)})
        return _core().compile_model(model, "CPU", dict(properties))
    except MemoryError:
        raise
    except Exception as error:  # its versions differ in what is a RuntimeError
        raise RuntimeError(f"OpenVINO can't compile the graph: {_summary(str(error))}") from error


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Ctrl-C after the block: in what OpenVINO calls back it would be taken for a failed conversion."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    try:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _as_they_lie(graph: torch.fx.GraphModule) -> bool:
    """Whether OpenVINO needs no copies of the constants in ``graph``."""
    return all(
        value.is_contiguous()
        for part in graph.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "get_attr" and isinstance(value := operator.attrgetter(node.target)(part), torch.Tensor)
    )


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
    if value.dtype in _UNKNOWN:
        raise TypeError(f"{what} of the graph is a tensor of {value.dtype}, which OpenVINO has not")


def _in_bfloat16(weights: Iterable[torch.Tensor]) -> bool:
    """Whether most elements of the weights of products are in bfloat16."""
    sizes: dict[torch.dtype, int] = {}
    for weight in weights:
        if weight.dim() > 1 and weight.is_floating_point():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    return 2 * sizes.get(torch.bfloat16, 0) > sum(sizes.values())


def _convolves(weights: Iterable[torch.Tensor]) -> bool:
    """Whether most of the weights of products are those of convolutions."""
    dims = [weight.dim() for weight in weights if weight.dim() > 1 and weight.is_floating_point()]
    return 2 * sum(dim > 2 for dim in dims) > len(dims)


def _needs_64_bits(value: torch.Tensor) -> bool:
    if value.numel() == 0:
        return False
    low, high = value.aminmax()
    return int(low) < _INTEGERS.min or int(high) > _INTEGERS.max
