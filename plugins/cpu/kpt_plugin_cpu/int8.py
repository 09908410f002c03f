"""int8: large linears in integer arithmetic, all else in bfloat16 where the CPU has it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kpt.specs import HardwareProfile, Observation, Skip, Undo, Variant
from kpt_plugin_cpu import native_int8
from kpt_plugin_cpu.casting import cast_calls, cast_weights, wide_dtype
from kpt_plugin_cpu.estimates import gain_of_dtype, rate_ratio
from kpt_plugin_cpu.inductor import compiler
from kpt_plugin_cpu.int8_linear import Int8Linear, joined, smoothing

#: Smaller weights gain nothing: quantising the activations costs more than the product saves.
_SMALLEST = 128 * 128
#: A decoder of 30 layers took inductor 72 s in int8 and 40 s in bfloat16: each linear is a dozen operations.
_COMPILE_RATIO = 1.8
#: How many times the rate of float32's products int8's need on a CPU without an instruction for them.
_LEAST_FASTER = 1.2
#: To compile the C++, once in a process: 2 to 4 s on a Zen 4.
_NATIVE_SECONDS = 3.0


class _Range:
    """The largest absolute weights and inputs of each channel, [K], of linears that share an input."""

    def __init__(self) -> None:
        self.weights = self.inputs = torch.zeros(())

    def include_weight(self, weight: torch.Tensor) -> None:
        self.weights = torch.maximum(self.weights, weight.float().abs().amax(0))

    def include_input(self, x: torch.Tensor) -> None:
        self.inputs = torch.maximum(self.inputs, x.reshape(-1, x.shape[-1]).float().abs().amax(0))


class Int8:
    """The `Pass` of the policy."""

    def __init__(self) -> None:
        #: What each linear's input is multiplied by, by path; the same tensor where the input is the same.
        self._inverses: dict[str, torch.Tensor] = {}

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        paths = tuple(_large_linears(observation.model))
        faster = rate_ratio(hardware, "int8")
        if "int8" not in hardware.native_dtypes and faster < _LEAST_FASTER:
            measured = f", and its int8 products run at {faster:.1f} times the rate of float32's"
            yield Skip(
                f"this CPU has no int8 dot product{measured if 'int8' in hardware.matmul_rates else ''}"
            )
        elif not paths:
            yield Skip("the model has no large linear layer")
        elif not hasattr(torch.ops.onednn, "qlinear_prepack"):
            yield Skip("this torch has no int8 linear")
        else:
            native = 0.0 if compiler() is None or native_int8.ready() else _NATIVE_SECONDS
            for rest in ("bfloat16", "float32"):
                if rest not in hardware.native_dtypes:
                    continue
                if rest != "float32" and wide_dtype(observation.model) is None:
                    yield Skip(
                        "the model has float32 and float64 weights: which outputs are float64 is not known"
                    )
                    continue
                yield Variant(
                    f"linears, {rest} between",
                    params={"rest": rest},
                    predicted_gain=gain_of_dtype(observation, hardware, "int8", rest=rest),
                    setup_seconds=3.0 * observation.parameter_bytes / max(hardware.bandwidth, 1e9) + native,
                    compile_ratio=_COMPILE_RATIO,
                    sites=("", *paths),
                    # Without one, the plan would be judged by the rule of those that keep dtypes.
                    compute_dtype="bfloat16" if rest == "bfloat16" else "int8",
                    derives=True,
                )

    def calibrate(self, model: torch.nn.Module, variant: Variant, run: Callable[[], None]) -> None:
        """Choose factors by how wide each channel of the linears' inputs is.

        Linears that are called with one tensor after another (queries, keys and values, say) get the same, so
        that the tensor is divided and rounded once in compiled code.
        """
        ranges: dict[str, _Range] = {}
        last: list[Any] = [None, _Range()]

        def note(path: str, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named.get("input")
            if not isinstance(x, torch.Tensor) or not x.numel():
                return
            if x is not last[0]:
                last[:] = x, _Range()
            if path not in ranges:
                ranges[path] = last[1]
                last[1].include_weight(module.weight.detach())
            ranges[path].include_input(joined(x.detach()))

        paths = _large_linears(model)
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                functools.partial(note, path), with_kwargs=True
            )
            for path in paths
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        chosen = {id(each): 1.0 / smoothing(each.weights, each.inputs) for each in ranges.values()}
        self._inverses = {path: chosen[id(each)] for path, each in ranges.items()}

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        undos: list[Callable[[], None]] = []
        wide = wide_dtype(model) or torch.float32
        for path in _large_linears(model):
            parent, _, name = path.rpartition(".")
            children = (model.get_submodule(parent) if parent else model)._modules
            linear = children[name]
            children[name] = Int8Linear(
                linear,  # type: ignore[arg-type]
                self._inverses.get(path),
                native=compiler() is not None,
            )
            undos.append(functools.partial(children.__setitem__, name, linear))
        undos += [_unfused(module) for module in model.modules() if _reads_weights(module)]
        if variant.params["rest"] != "float32":
            rest = getattr(torch, variant.params["rest"])
            undos += [cast_weights(model, rest)[1], cast_calls(model, rest, wide)]

        def undo() -> None:
            for step in reversed(undos):
                step()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return any(isinstance(module, Int8Linear) for module in model.modules())


def _reads_weights(module: torch.nn.Module) -> bool:
    """Whether eager's fused operation for ``module`` would go on with the weights that were replaced."""
    return isinstance(module, torch.nn.TransformerEncoderLayer) and any(
        isinstance(getattr(module, name, None), Int8Linear) for name in ("linear1", "linear2")
    )


def _unfused(layer: torch.nn.Module) -> Callable[[], None]:
    """Have ``layer`` call its modules, as for an activation that the fused operation does not know."""
    before = layer.__dict__["activation_relu_or_gelu"]
    layer.__dict__["activation_relu_or_gelu"] = 0
    return functools.partial(layer.__dict__.__setitem__, "activation_relu_or_gelu", before)


def _large_linears(model: torch.nn.Module) -> list[str]:
    """Paths of plain linears that are worth it; each shared module once."""
    return [
        path
        for path, module in model.named_modules()
        if path
        and type(module) is torch.nn.Linear
        and module.weight.numel() >= _SMALLEST
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and "forward" not in module.__dict__
    ]
