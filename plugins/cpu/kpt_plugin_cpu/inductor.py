"""Compilation with inductor: live or frozen weights, a C++ wrapper, measured templates, repeated blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kpt.compiling import CompiledModule, RepeatedParts
from kpt.specs import Skip, Variant
from kpt_plugin_cpu import estimates
from kpt_plugin_cpu.attention import ShortAttention
from kpt_plugin_cpu.multihead import written_out
from kpt_plugin_cpu.packed_weights import PackedWeights

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo


#: Blocks are compiled once where at least this share of the model's modules need not be.
_LEAST_REPEATED = 0.4
#: How much longer a call takes whose products are not fused with what follows them, and for each part, in
#: seconds, the call of its code: 2 and 4 % were measured for 30 layers.
_UNFUSED, _PER_PART = 1.02, 30e-6
#: How many times as long a model takes to compile for training: the backward graph is about twice the other.
_WITH_BACKWARD = 3
#: Share of the faster library's rate from which the other one is tried, too: rates are measured at one size.
_CLOSE = 0.9


def compiler() -> str | None:
    """The C++ compiler that inductor would call, or None."""
    candidates = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


@contextmanager
def packing_for_onednn() -> Iterator[None]:
    """Let inductor pack fp32 weights for oneDNN, with which it also fuses activations, instead of MKL.

    Inductor chooses oneDNN for any weight whose products may run in reduced precision, so permission
    for tf32 is given while it compiles. The products themselves ask when they run, when it is gone:
    they stay in fp32.

    The permission is the process's, and it holds for as long as a graph is lowered: fp32 products that
    another thread runs through oneDNN in that time may run in reduced precision where the CPU has one.
    Optimise before serving from other threads where that matters. What was set before is put back,
    also after an error.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def repeatable(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile by inductor, with a backward pass that leaves what the forward saved for it, as eager's does.

    Otherwise it takes that memory for its own results, and ``backward(retain_graph=True)`` raises.
    """
    import torch._functorch.config as functorch_config

    inductor = torch._dynamo.lookup_backend("inductor")
    if not torch.is_grad_enabled():
        return inductor(graph, example_inputs)
    import torch._inductor.config as inductor_config

    # Inductor's cache does not ask whether memory is given away: a name that no graph holds tells its keys
    # apart. Of what the cache above it returns, the note below would be missing.
    names = {**inductor_config.unsafe_marked_cacheable_functions, "kpt.repeatable": "1"}
    with (
        functorch_config.patch(donated_buffer=False, enable_autograd_cache=False),
        inductor_config.patch(unsafe_marked_cacheable_functions=names),
    ):
        lowered = inductor(graph, example_inputs)
    # At run time torch asks whether the list of such memory is empty, and takes one that is missing for full.
    context = torch._guards.TracingContext.try_get()
    facts: Any = context.fw_metadata if context is not None else None
    if facts is not None and facts.bw_donated_idxs is None:
        facts.bw_donated_idxs = []
    return lowered


def declared_dims(observation: Observation) -> dict[str, dict[str, str]]:
    """Dynamic axes by input, in the form that a recipe keeps (JSON has no integer keys)."""
    return {
        leaf.name: {str(axis): name for axis, name in leaf.dims.items()}
        for leaf in observation.spec.leaves
        if leaf.dims
    }


def dims_of(params: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """The ``dims`` of a variant's parameters, as `declared_dims` made them, by number of axis."""
    given = params.get("dims") or {}
    return {name: {int(axis): dim for axis, dim in axes.items()} for name, axes in given.items()}


def declared_bounds(observation: Observation) -> dict[str, int]:
    """The largest size of each axis that is dynamic in some input, where the user declared one for all.

    A range that was only guessed from the examples is no bound: longer calls are served too.
    """
    bounds: dict[str, int] = {}
    open_axes = set()
    for leaf in observation.spec.leaves:
        for axis, name in leaf.dims.items():
            dimension = observation.spec.dimensions[name]
            if dimension.declared:
                bounds[str(axis)] = max(bounds.get(str(axis), 0), dimension.high)
            else:
                open_axes.add(str(axis))
    return {axis: most for axis, most in bounds.items() if axis not in open_axes}


def repeated_blocks(model: torch.nn.Module) -> list[str]:
    """Paths of the outermost children of a module list that are of one class: a model's layers."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(path + ".") for path in found):
            continue
        children = list(module.named_children())
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(children) > 1:
            kinds = {type(child) for _, child in children}
            if len(kinds) == 1 and next(children[0][1].children(), None) is not None:
                found += [f"{name}.{child}" if name else child for child, _ in children]
    return found


def repeated_share(model: torch.nn.Module, blocks: list[str]) -> float:
    """The share of the modules with parameters that are in ``blocks`` after the first of each list."""

    def count(module: torch.nn.Module) -> int:
        return sum(1 for each in module.modules() if next(each.parameters(False), None) is not None)

    lists: dict[str, int] = {}
    repeated = 0
    for path in blocks:
        name = path.rpartition(".")[0]
        repeated += count(model.get_submodule(path)) if name in lists else 0
        lists[name] = lists.get(name, 0) + 1
    return repeated / max(count(model), 1)


def _moves_statistics(block: torch.nn.Module) -> bool:
    """Whether ``block`` writes to running statistics when it is called in training."""
    return any(getattr(each, "track_running_stats", False) and each.training for each in block.modules())


class Inductor:
    """Replaces the root's forward by compiled code, or those of its largest parts where it is not one graph.

    With frozen weights, constants are folded and packed: faster, but copies that have to be watched.
    Live weights are read on each call, and serve training too. Where blocks repeat, one is compiled for all,
    with weights as inputs, packed ones in inference: nearly as fast, and ready in a fraction of the time.
    """

    def __init__(self) -> None:
        self.compiled: CompiledModule | None = None
        self.repeated: RepeatedParts | None = None

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterator[Variant | Skip]:
        if compiler() is None:
            yield Skip("no C++ compiler was found (g++ or clang++, or the one named by CXX)")
            return
        estimate = estimates.estimate(observation, hardware)
        modules = estimates.modules_with_work(observation)
        setup = estimates.compile_seconds(observation)
        shared: dict[str, Any] = {
            "dims": declared_dims(observation),
            "bounds": declared_bounds(observation),
            # A model that samples when it is called gives what eager gives of the same seed. In training
            # dropout is judged by its rate, and where it is all that is drawn, inductor's own numbers are the
            # faster ones.
            "eager_random": not observation.training or observation.samples,
        }
        live = estimate.gain(rest_ratio=estimates.FUSED)
        if observation.training:
            setup *= _WITH_BACKWARD
        yield Variant("live", {**shared, "freeze": False}, live, setup, reproducible=True)
        if not observation.training:
            # With a dynamic number of rows inductor packs for oneDNN in any case.
            onednn = estimates.rate_ratio(hardware, estimates.ONEDNN)
            mkl = 1.0 if observation.dynamic else estimates.rate_ratio(hardware, estimates.MKL)
            by_onednn = observation.dynamic or onednn >= mkl or not hardware.matmul_rates.get(estimates.MKL)
            other = mkl if by_onednn else onednn
            frozen = estimate.gain(rate_ratio=max(onednn, mkl, 1.0), rest_ratio=0.9 * estimates.FUSED)
            choice = {**shared, "freeze": True, "onednn": by_onednn}
            note = f"weights packed for {'oneDNN' if by_onednn else 'MKL'}"
            yield Variant("frozen", choice, frozen, setup, derives=True, reproducible=True, note=note)
            # What Python spends between kernels; about two calls for a module with parameters.
            between = min(2e-6 * 2 * modules, 0.3 * estimate.total / frozen)
            wrapped = estimate.total / (estimate.total / frozen - between)
            yield Variant(
                "frozen, C++ wrapper",
                {**choice, "cpp_wrapper": True},
                wrapped,
                1.2 * setup,
                derives=True,
                reproducible=True,
                note=note,
            )
            if other > _CLOSE * max(onednn, mkl) and not observation.dynamic:
                yield Variant(
                    "frozen, MKL" if by_onednn else "frozen, oneDNN",
                    {**choice, "onednn": not by_onednn},
                    estimate.gain(rate_ratio=max(other, 1.0), rest_ratio=0.9 * estimates.FUSED),
                    setup,
                    derives=True,
                    reproducible=True,
                )
            # Inductor's autotuner asks for the precision of all products, which torch refuses to tell
            # while oneDNN's own is another.
            yield Variant(
                "max-autotune",
                {**choice, "onednn": False, "autotune": True},
                0.97 * frozen,
                8.0 * setup,
                derives=True,
                note="C++ templates compete with the library for each product",
            )
        yield from self._repeated(observation, hardware, shared)

    def _repeated(
        self, observation: Observation, hardware: HardwareProfile, shared: dict[str, Any]
    ) -> Iterator[Variant | Skip]:
        """One block compiled for all, where enough of the model is blocks that repeat."""
        training = observation.training
        blocks = repeated_blocks(observation.model)
        share = repeated_share(observation.model, blocks)
        if share < _LEAST_REPEATED:
            return
        if not training and not torch.backends.mkldnn.is_available():
            yield Skip("this torch has no oneDNN, which weights of repeated blocks are packed for")
            return
        if training and any(_moves_statistics(observation.model.get_submodule(path)) for path in blocks):
            yield Skip(
                "blocks in training move running statistics, and a graph that writes to them is not cut"
            )
            return
        setup = estimates.compile_seconds(observation, share)
        estimate = estimates.estimate(observation, hardware)
        params = {**shared, "freeze": False, "repeated": True, "packs": not training}
        if training:
            seconds = estimate.total / estimate.gain(rest_ratio=estimates.FUSED)
            seconds += _WITH_BACKWARD * _PER_PART * len(blocks)
            gain, setup = estimate.total / seconds, _WITH_BACKWARD * setup
            note = "one block compiled for all"
            yield Variant("repeated blocks", params, gain, setup, reproducible=True, note=note)
            return
        onednn = estimates.rate_ratio(hardware, estimates.ONEDNN)
        frozen = estimate.gain(rate_ratio=max(onednn, 1.0), rest_ratio=0.9 * estimates.FUSED)
        seconds = _UNFUSED * estimate.total / frozen + _PER_PART * len(blocks)
        yield Variant(
            "repeated blocks",
            {**params, "onednn": True},
            estimate.total / seconds,
            setup,
            derives=True,
            reproducible=True,
            note="one block compiled for all, with packed weights",
        )

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        arguments = settings(variant.params, model)
        self.compiled = compiled = CompiledModule(model, **arguments)
        backend, passes = arguments.get("backend"), arguments["graph_pass"]
        self.repeated = backend if isinstance(backend, RepeatedParts) else None

        def undo() -> None:
            compiled.dispose()
            if isinstance(backend, RepeatedParts):
                backend.clear()
            if passes.packed is not None:
                passes.packed.clear()

        return undo

    def verify_applied(self, model: torch.nn.Module) -> bool:
        ran = self.compiled is not None and self.compiled.ran
        return ran and (self.repeated is None or self.repeated.distinct < self.repeated.parts)

    def effect(self) -> str:
        return self.compiled.told if self.compiled is not None else ""


class Passes:
    """Multi-head attention written out, and then the others, each where it is wanted."""

    def __init__(self, attention: ShortAttention | None, packed: PackedWeights | None) -> None:
        self.attention, self.packed = attention, packed

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> torch.fx.GraphModule:
        graph = written_out(graph, example_inputs)
        for change in (self.attention, self.packed):
            graph = change(graph, example_inputs) if change is not None else graph
        return graph


def settings(params: Mapping[str, Any], model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Arguments of a `CompiledForward` for a variant's parameters; ``model`` is whose weights are packed."""
    frozen = bool(params.get("freeze"))
    inductor: dict[str, Any] = {
        "freezing": frozen,
        "fallback_random": bool(params.get("eager_random")),
    }
    if params.get("cpp_wrapper"):
        inductor["cpp_wrapper"] = True
    if params.get("autotune"):
        inductor |= {
            "max_autotune": True,
            "max_autotune_gemm_backends": "CPP,ATEN",
            "autotune_num_choices_displayed": 0,
        }
        import torch._inductor.config as known

        if hasattr(known, "max_autotune_report_choices_stats"):  # JSON of each contest, on stderr
            inductor["max_autotune_report_choices_stats"] = False
    bounds = {int(axis): most for axis, most in (params.get("bounds") or {}).items()}
    repeated = bool(params.get("repeated")) and model is not None
    packs = repeated and bool(params.get("packs", True))
    attention = ShortAttention(bounds) if frozen or packs else None
    packed: PackedWeights | None = None
    backend: dict[str, Any] = {} if frozen else {"backend": repeatable}
    if packs and model is not None:
        # Packed weights have no strides, which generated code would ask its inputs for.
        inductor["size_asserts"] = False
        packed = PackedWeights(model, float32=bool(params.get("onednn")))
        backend["backend"] = RepeatedParts()
    elif repeated:
        backend["backend"] = RepeatedParts(repeatable)
    around: Callable[[], Any] | None = None
    if frozen and params.get("onednn") and hasattr(torch.backends.mkldnn, "matmul"):
        around = packing_for_onednn
    return {
        "inductor_config": inductor,
        "dynamic_dims": dims_of(params),
        "graph_pass": Passes(attention, packed),
        "around_compilation": around,
        **backend,
    }
