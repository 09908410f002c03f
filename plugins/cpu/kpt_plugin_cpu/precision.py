"""Precision policies: bf16 throughout, and int8 products in linear layers with bf16 around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from kpt.specs import Skip, Variant
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.int8_linear import Int8Linear
from kpt_plugin_cpu.wrapping import wrap_forward

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Undo
    from kpt.transaction.observe import Observation

#: Statistics that lose their meaning in eight bits of mantissa; torch runs these on mixed dtypes.
_KEPT = (nn.modules.batchnorm._NormBase,)
#: Weights with fewer elements gain nothing: quantising the activations costs as much.
SMALLEST_INT8 = 1 << 14


def _converter(source: torch.dtype, target: torch.dtype) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        return value.to(target) if isinstance(value, torch.Tensor) and value.dtype is source else value

    return convert


def cast_weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace fp32 parameters and stored fp32 buffers of a workspace by copies; return how many.

    Buffers that a state dict leaves out stay: they are tables computed in fp32 on purpose, such as
    rotary frequencies, whose products with positions need more than eight bits.
    """
    copies: dict[int, torch.Tensor] = {}  # tied weights stay tied

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            cast = tensor.detach().to(dtype)
            copies[id(tensor)] = nn.Parameter(cast, False) if isinstance(tensor, nn.Parameter) else cast
        return copies[id(tensor)]

    for module in model.modules():
        if isinstance(module, _KEPT):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype is torch.float32:
                module._parameters[name] = copy_of(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            stored = name not in module._non_persistent_buffers_set
            if buffer is not None and stored and buffer.dtype is torch.float32:
                module._buffers[name] = copy_of(buffer)
    return len(copies)


def cast_calls(model: nn.Module, dtype: torch.dtype) -> Undo:
    """Cast fp32 inputs of the root's forward to ``dtype``, and outputs in it back to fp32."""
    down, up = _converter(torch.float32, dtype), _converter(dtype, torch.float32)

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map(down, (args, kwargs))
            return pytree.tree_map(up, inner(*args, **kwargs))

        return forward

    return wrap_forward(model, make)


def _refusal(observation: Observation, hardware: HardwareProfile, dtype: str) -> str | None:
    if "float32" not in observation.parameter_dtypes:
        return f"no parameter is float32 (they are {', '.join(sorted(observation.parameter_dtypes)) or 'none'})"
    if dtype not in hardware.native_dtypes:
        return f"this CPU has no {dtype} arithmetic (it has {', '.join(hardware.native_dtypes)})"
    return None


class Bfloat16:
    """Casts a workspace to bf16, or runs it under autocast where code mixes dtypes itself."""

    def __init__(self) -> None:
        self.copies = 0
        self.runs = 0

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        reason = _refusal(observation, hardware, "bfloat16")
        if reason is not None:
            yield Skip(reason)
            return
        estimate = estimates.estimate(observation, hardware)
        ratio = estimates.rate_ratio(hardware, "bfloat16")
        setup = 0.1 + 2.0 * observation.parameter_bytes / max(hardware.bandwidth, 1e9)
        yield Variant(
            "cast",
            {"how": "cast"},
            estimate.gain(rate_ratio=ratio, rest_ratio=0.8),
            setup,
            compute_dtype="bfloat16",
            derives=True,
            reproducible=True,
        )
        yield Variant(
            "autocast",
            {"how": "autocast"},
            estimate.gain(rate_ratio=0.8 * ratio, rest_ratio=1.1),
            setup,
            compute_dtype="bfloat16",
            reproducible=True,
            note="norms and softmax stay fp32; for models whose code mixes dtypes",
        )

    def apply(self, model: nn.Module, variant: Variant) -> Undo:
        if variant.params["how"] == "autocast":
            return self._autocast(model)
        self.copies = cast_weights(model, torch.bfloat16)
        return cast_calls(model, torch.bfloat16)

    def _autocast(self, model: nn.Module) -> Undo:
        up = _converter(torch.bfloat16, torch.float32)

        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                    return pytree.tree_map(up, inner(*args, **kwargs))

            return forward

        undo = wrap_forward(model, make)
        self.copies = -1
        return undo

    def verify_applied(self, model: nn.Module) -> bool:
        if self.copies < 0:
            return "forward" in model.__dict__
        return self.copies > 0 and any(p.dtype is torch.bfloat16 for p in model.parameters())


def int8_candidates(model: nn.Module) -> list[str]:
    """Paths of the linear layers that are large enough, of exactly that class and in fp32."""
    return [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and module.weight.dtype is torch.float32
        and module.weight.numel() >= SMALLEST_INT8
    ]


class Int8:
    """Int8 products in linear layers, with activations quantised row by row in each call."""

    def __init__(self) -> None:
        self.replaced: list[str] = []

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        reason = _refusal(observation, hardware, "int8")
        if reason is not None:
            yield Skip(reason)
            return
        paths = int8_candidates(observation.model)
        if not paths:
            yield Skip(f"no linear layer has {SMALLEST_INT8} weights or more")
            return
        estimate = estimates.estimate(observation, hardware)
        # Quantising rows and scaling products is a pass over each input and output.
        gain = estimate.gain(rate_ratio=estimates.rate_ratio(hardware, "int8"), rest_ratio=1.0)
        setup = 0.2 + 6.0 * observation.parameter_bytes / max(hardware.bandwidth, 1e9)
        rest = "bfloat16" if "bfloat16" in hardware.native_dtypes else "float32"
        variants = [("all linear layers", ()), ("all but the last linear layer", (paths[-1],))]
        for name, spared in variants[: 2 if len(paths) > 1 else 1]:
            yield Variant(
                name,
                {"rest": rest, "spared": list(spared)},
                gain if not spared else 1 + 0.97 * (gain - 1),
                setup,
                compute_dtype="int8",
                derives=True,
                reproducible=True,
            )

    def apply(self, model: nn.Module, variant: Variant) -> Undo:
        spared = set(variant.params["spared"])
        self.replaced = [path for path in int8_candidates(model) if path not in spared]
        made: dict[int, Int8Linear] = {}  # a module used in two places stays one
        for path in self.replaced:
            parent, _, name = path.rpartition(".")
            linear = model.get_submodule(path)
            if id(linear) not in made:
                made[id(linear)] = Int8Linear(linear)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), name, made[id(linear)])
        if variant.params["rest"] != "bfloat16":
            return lambda: None
        cast_weights(model, torch.bfloat16)
        return cast_calls(model, torch.bfloat16)

    def verify_applied(self, model: nn.Module) -> bool:
        return bool(self.replaced) and all(
            isinstance(model.get_submodule(path), Int8Linear) for path in self.replaced
        )
