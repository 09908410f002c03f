"""What the cpu plugin offers. Only names: nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterable

import kpt
from kpt.specs import ContenderSpec, HardwareSpec, PassSpec, PolicySpec

CPU = ("cpu",)


@kpt.hookimpl
def kpt_hardware() -> Iterable[HardwareSpec]:
    yield HardwareSpec(name="cpu", device_type="cpu", probe="kpt_plugin_cpu.probe:CpuProbe")


@kpt.hookimpl
def kpt_passes() -> Iterable[PassSpec]:
    yield PassSpec(
        name="cpu.channels_last",
        phase="layout",
        entry="kpt_plugin_cpu.layout:ChannelsLast",
        hardware=CPU,
        summary="Keeps images and convolution weights with the channels innermost.",
    )
    yield PassSpec(
        name="cpu.onednn_linear",
        phase="kernels",
        entry="kpt_plugin_cpu.onednn:OneDnnLinear",
        hardware=CPU,
        summary="Linear layers multiply through oneDNN, with weights packed once.",
    )
    yield PassSpec(
        name="cpu.inductor",
        phase="compile",
        entry="kpt_plugin_cpu.inductor:Inductor",
        modes=("inference", "training"),
        hardware=CPU,
        summary="Compiles the whole forward, or each repeated block, with inductor.",
    )
    yield PassSpec(
        name="cpu.drop_mask",
        phase="shapes",
        entry="kpt_plugin_cpu.masks:DropMask",
        hardware=CPU,
        provides=("mask-free",),
        summary="Leaves out an attention mask that masks nothing; each call is checked.",
    )
    yield PassSpec(
        name="cpu.pack_batch",
        phase="shapes",
        entry="kpt_plugin_cpu.packing:PackBatch",
        hardware=CPU,
        requires=("mask-free",),
        summary="Runs a padded batch as sub-batches of similar length, without the padding.",
    )
    yield PassSpec(
        name="cpu.threads",
        phase="runtime",
        entry="kpt_plugin_cpu.threads:Threads",
        hardware=CPU,
        summary="Runs the forward on another number of threads and restores it.",
    )


@kpt.hookimpl
def kpt_precision_policies() -> Iterable[PolicySpec]:
    yield PolicySpec(
        name="cpu.bfloat16",
        entry="kpt_plugin_cpu.precision:Bfloat16",
        compute_dtype="bfloat16",
        storage_dtype="bfloat16",
        level="production",
        hardware=CPU,
        summary="Computes in bf16 on copies of the weights; inputs and outputs keep their dtype.",
    )
    yield PolicySpec(
        name="cpu.int8",
        entry="kpt_plugin_cpu.precision:Int8",
        compute_dtype="int8",
        storage_dtype="int8",
        level="aggressive",
        hardware=CPU,
        summary="Linear layers multiply int8 weights by dynamically quantised rows; the rest is bf16.",
    )


@kpt.hookimpl
def kpt_contenders() -> Iterable[ContenderSpec]:
    place = "kpt_plugin_cpu.contenders"
    yield ContenderSpec("torch.compile", f"{place}:Compiled", ("torch",), "exact", "inductor, defaults")
    yield ContenderSpec(
        "torch.compile freezing", f"{place}:Frozen", ("torch",), "exact", "inductor with frozen weights"
    )
    yield ContenderSpec("bf16 eager", f"{place}:EagerBfloat16", ("torch",), "production", "model.bfloat16()")
    yield ContenderSpec(
        "bf16 torch.compile freezing",
        f"{place}:FrozenBfloat16",
        ("torch",),
        "production",
        "bf16, inductor, frozen weights, C++ wrapper",
    )
    yield ContenderSpec(
        "onnxruntime", f"{place}:OnnxRuntime", ("onnxruntime", "onnx", "onnxscript"), "exact", "fp32"
    )
    yield ContenderSpec(
        "onnxruntime int8",
        f"{place}:OnnxRuntimeInt8",
        ("onnxruntime", "onnx", "onnxscript"),
        "aggressive",
        "dynamically quantised to int8",
    )
    yield ContenderSpec(
        "openvino fp32", f"{place}:OpenVinoFloat32", ("openvino",), "exact", "inference precision f32"
    )
    yield ContenderSpec(
        "openvino", f"{place}:OpenVino", ("openvino",), "production", "defaults: bf16 where the CPU has it"
    )
    yield ContenderSpec(
        "torchao int8",
        f"{place}:TorchAoInt8",
        ("torchao",),
        "aggressive",
        "dynamic int8 activations, int8 weights, inductor with frozen weights",
    )
