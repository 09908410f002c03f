"""Whom `kpt bench` compares with on a CPU. Each gets what its own documentation recommends for speed.

Every contender receives the user's model in eval mode and one example call by keyword, works on a
copy, and returns a function of such calls. Their libraries are imported when they are prepared.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = Mapping[str, Any]
Run = Callable[[Inputs], Any]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _eager(model: torch.nn.Module, dtype: torch.dtype | None = None) -> Run:
    def run(inputs: Inputs) -> Any:
        given = {name: _cast(value, dtype) for name, value in inputs.items()} if dtype else inputs
        with torch.inference_mode():
            return model(**given)

    return run


def _own_code(model: torch.nn.Module) -> Callable[..., Any]:
    """A function around ``model`` with a code object of its own.

    torch.compile keeps compiled code on code objects: without this, one contender would be served
    with what another one compiled.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    forward.__code__ = forward.__code__.replace(co_name="forward")
    return forward


class EagerBf16:
    """The model cast to bfloat16, eager."""

    def prepare(self, model: torch.nn.Module, example: Inputs) -> Run:
        run = _eager(copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16)
        run(example)
        return run


class Compile:
    """torch.compile with its defaults."""

    freezing = False
    dtype: torch.dtype | None = None

    def prepare(self, model: torch.nn.Module, example: Inputs) -> Run:
        import torch._inductor.config as inductor

        twin = copy.deepcopy(model)
        if self.dtype is not None:
            twin = twin.to(self.dtype)
        compiled = torch.compile(_own_code(twin))
        dtype, freezing = self.dtype, self.freezing

        def run(inputs: Inputs) -> Any:
            given = {name: _cast(value, dtype) for name, value in inputs.items()} if dtype else inputs
            # Freezing folds weights only where no gradient can be asked for; a new size compiles again.
            with torch.no_grad(), inductor.patch(freezing=freezing):
                return compiled(**given)

        run(example)
        return run


class CompileBf16Freezing(Compile):
    """torch.compile of the bfloat16 model with weights frozen into the graph."""

    freezing = True
    dtype = torch.bfloat16


class CompileFreezing(Compile):
    """torch.compile with weights frozen into the graph."""

    freezing = True


class TorchaoInt8:
    """torchao's dynamic int8 linears under torch.compile with freezing."""

    def prepare(self, model: torch.nn.Module, example: Inputs) -> Run:
        import torch._inductor.config as inductor
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        twin = copy.deepcopy(model)
        quantize_(twin, Int8DynamicActivationInt8WeightConfig())
        compiled = torch.compile(_own_code(twin))

        def run(inputs: Inputs) -> Any:
            with torch.no_grad(), inductor.patch(freezing=True, cpp_wrapper=True):
                return compiled(**inputs)

        run(example)
        return run


class Onnx:
    """ONNX Runtime on a graph exported by torch.onnx, all optimisations on."""

    quantized = False

    def prepare(self, model: torch.nn.Module, example: Inputs) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        session = onnxruntime.InferenceSession(
            self.graph(model, example), options, providers=["CPUExecutionProvider"]
        )
        names = {value.name for value in session.get_inputs()}
        shapes = {value.name: value.shape for value in session.get_inputs()}

        def run(inputs: Inputs) -> Any:
            given = {name: value.numpy() for name, value in inputs.items() if name in names}
            for name, value in given.items():
                if any(isinstance(size, int) and size != got for size, got in zip(shapes[name], value.shape)):
                    raise ValueError(
                        f"{name} has shape {value.shape}; the session was built for {shapes[name]}"
                    )
            return tuple(torch.from_numpy(value) for value in session.run(None, given))

        run(example)
        return run

    def graph(self, model: torch.nn.Module, example: Inputs) -> bytes | str:
        import os
        import tempfile

        exported = exported_onnx(model, example)
        if not self.quantized:
            return exported
        from onnxruntime.quantization import QuantType, quantize_dynamic

        folder = tempfile.mkdtemp()
        source, target = os.path.join(folder, "model.onnx"), os.path.join(folder, "int8.onnx")
        with open(source, "wb") as file:
            file.write(exported)
        # Shape inference of the exporter's own annotations fails on quantised graphs: they are dropped.
        import onnx

        graph = onnx.load(source)
        del graph.graph.value_info[:]
        onnx.save(graph, source)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        return target


class OnnxInt8(Onnx):
    """ONNX Runtime with dynamically quantised linears."""

    quantized = True


def exported_onnx(model: torch.nn.Module, example: Inputs) -> bytes:
    """The model as an ONNX graph, with dynamic sizes where the export allows them, else static ones."""
    twin = copy.deepcopy(model).eval()
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    dims = {
        name: dict.fromkeys(range(min(value.dim(), 2)), torch.export.Dim.AUTO)
        for name, value in tensors.items()
        if not value.is_floating_point()
    }
    errors = []
    for shapes in ({name: dims.get(name) for name in tensors}, None) if dims else (None,):
        try:
            program = torch.onnx.export(
                twin, kwargs=dict(tensors), dynamo=True, dynamic_shapes=shapes, verbose=False, optimize=True
            )
        except Exception as error:  # noqa: BLE001 - the exporter fails in many ways; static sizes come next
            errors.append(error)
            continue
        buffer = io.BytesIO()
        program.save(buffer)
        return buffer.getvalue()
    raise errors[-1]


@functools.cache
def _openvino() -> Any:
    """OpenVINO's entry, one for the life of the process: two that go leave its signals without a stack."""
    import openvino

    return openvino.Core()


class OpenVino:
    """OpenVINO's CPU plugin with its defaults (bfloat16 inside where the CPU has it)."""

    precision: str | None = None

    def prepare(self, model: torch.nn.Module, example: Inputs) -> Run:
        tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
        core = _openvino()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        if self.precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = self.precision
        compiled = core.compile_model(core.read_model(exported_onnx(model, example)), "CPU", settings)
        request = compiled.create_infer_request()
        names = {name for port in compiled.inputs for name in port.names}
        outputs = len(compiled.outputs)

        def run(inputs: Inputs) -> Any:
            given = {name: value.numpy() for name, value in inputs.items() if name in names}
            result = request.infer(given, share_inputs=True)
            return tuple(torch.from_numpy(result[index].copy()) for index in range(outputs))

        run({name: tensors[name] for name in tensors})
        return run


class OpenVinoFp32(OpenVino):
    """OpenVINO's CPU plugin held to float32."""

    precision = "f32"
