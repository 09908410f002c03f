"""The hooks of this plugin. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from kpt import hookimpl
from kpt.specs import ContenderSpec, HardwareSpec, KernelSpec, PassSpec, PolicySpec


@hookimpl
def kpt_hardware() -> Iterator[HardwareSpec]:
    yield HardwareSpec("cpu", "cpu", "kpt_plugin_cpu.probe:CpuProbe")


@hookimpl
def kpt_kernels() -> Iterator[KernelSpec]:
    yield KernelSpec(
        op="linear",
        name="onednn",
        entry="kpt_plugin_cpu.onednn:linear",
        supports="kpt_plugin_cpu.onednn:supports",
        setup="kpt_plugin_cpu.onednn:prepare",
        hardware=("cpu",),
        dtypes=("float32",),
        predict="kpt_plugin_cpu.onednn:predict",
        source="oneDNN through torch.ops.mkldnn",
    )
    yield KernelSpec(
        op="attention",
        name="native",
        entry="kpt_plugin_cpu.native_attention:attention",
        supports="kpt_plugin_cpu.native_attention:supports",
        hardware=("cpu",),
        dtypes=("float32", "bfloat16"),
        compile_safe=True,
        reproducible=True,
        predicted_gain=1.05,
        source="C++ compiled on this machine",
    )


@hookimpl
def kpt_precision_policies() -> Iterator[PolicySpec]:
    yield PolicySpec(
        "bf16",
        "kpt_plugin_cpu.bf16:Bf16",
        "bfloat16",
        "bfloat16",
        hardware=("cpu",),
        summary="weights and arithmetic in bfloat16, inputs and outputs as they were",
    )
    yield PolicySpec(
        "int8",
        "kpt_plugin_cpu.int8:Int8",
        "int8",
        "int8",
        level="aggressive",
        hardware=("cpu",),
        summary="linears in int8 arithmetic, all else in bfloat16 where the CPU has it",
    )


@hookimpl
def kpt_passes() -> Iterator[PassSpec]:
    cpu = ("cpu",)
    yield PassSpec(
        "channels-last",
        "layout",
        "kpt_plugin_cpu.channels_last:ChannelsLast",
        hardware=cpu,
        summary="convolution weights and activations with channels innermost",
    )
    yield PassSpec(
        "inductor",
        "compile",
        "kpt_plugin_cpu.inductor:Inductor",
        modes=("inference", "training"),
        hardware=cpu,
        conflicts=("kernel:linear",),
        summary="the whole forward compiled, weights live or frozen into it",
    )
    yield PassSpec(
        "onednn-graph",
        "compile",
        "kpt_plugin_cpu.onednn_graph:OnednnGraph",
        hardware=cpu,
        conflicts=("kernel:linear",),
        summary="the whole forward by TorchScript and oneDNN Graph, weights frozen into it",
    )
    yield PassSpec(
        "captured",
        "compile",
        "kpt_plugin_cpu.captured:Captured",
        hardware=cpu,
        conflicts=("kernel:linear",),
        priority=-1,  # where torch's deterministic mode fixes the order, compilers come first
        summary="the whole forward as a captured graph, without Python between its operations",
    )
    yield PassSpec(
        "drop-mask",
        "shapes",
        "kpt_plugin_cpu.masks:DropMask",
        hardware=cpu,
        priority=1,
        summary="an attention mask that masks nothing is left out of the call",
    )
    yield PassSpec(
        "pack-padding",
        "shapes",
        "kpt_plugin_cpu.packing:PackPadding",
        hardware=cpu,
        priority=2,
        summary="rows of a padded batch run at their own lengths",
    )
    yield PassSpec(
        "pack-tokens",
        "kernels",  # of the graph, beneath a compiler and above the kernels in it
        "kpt_plugin_cpu.token_packing:PackTokens",
        hardware=cpu,
        conflicts=("pack-padding", "kernel:linear"),
        priority=10,
        summary="linears, norms and the like run for the tokens of a padded batch that count",
    )
    yield PassSpec(
        "autocast",
        "runtime",  # outside of compilers, which see it as they see one of the user's
        "kpt_plugin_cpu.autocast:Autocast",
        level="production",
        modes=("training",),
        hardware=cpu,
        summary="training steps under autocast: products in bfloat16, weights and gradients in float32",
    )
    yield PassSpec(
        "threads",
        "runtime",
        "kpt_plugin_cpu.threads:Threads",
        modes=("inference", "training"),
        hardware=cpu,
        summary="another number of threads during the call",
    )


@hookimpl
def kpt_contenders() -> Iterator[ContenderSpec]:
    home = "kpt_plugin_cpu.contenders"
    onnx = ("onnx", "onnxscript", "onnxruntime")
    yield ContenderSpec("eager-bf16", f"{home}:EagerBf16", level="production")
    yield ContenderSpec("torch.compile", f"{home}:Compile")
    yield ContenderSpec("torch.compile+freezing", f"{home}:CompileFreezing")
    yield ContenderSpec("torch.compile+bf16+freezing", f"{home}:CompileBf16Freezing", level="production")
    yield ContenderSpec("torchao-int8", f"{home}:TorchaoInt8", ("torchao",), level="aggressive")
    yield ContenderSpec("onnxruntime", f"{home}:Onnx", onnx)
    yield ContenderSpec("onnxruntime-int8", f"{home}:OnnxInt8", onnx, level="aggressive")
    openvino = ("onnx", "onnxscript", "openvino")
    yield ContenderSpec("openvino", f"{home}:OpenVino", openvino, level="production")
    yield ContenderSpec("openvino-fp32", f"{home}:OpenVinoFp32", openvino)
