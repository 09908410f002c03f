"""Recognition by proof: what has to be found, without a trace and in time."""

from __future__ import annotations

import copy
import math
import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kpt import ops
from kpt.ops.comparison import gradients_of
from recognised import MLP, Call, PlusOne, RMSNorm, X, only_site, recognised


def test_rms_norm_binds_the_live_weight_and_epsilon() -> None:
    module = RMSNorm(eps=1e-5)
    site = only_site(module, X)
    assert site.op == "rms_norm"
    assert dict(site.binding.arguments) == {
        "x": "hidden_states",
        "weight": "self.weight",
        "offset": "0.0",
        "eps": "self.variance_epsilon",
    }
    assert site.modes == ("inference", "training")
    assert site.dtypes == ("float32", "bfloat16", "float16")
    with torch.no_grad():
        module.weight.fill_(3.0)
    module.variance_epsilon = 0.5
    arguments = site.arguments(X)
    assert arguments["weight"] is module.weight and arguments["eps"] == 0.5 and arguments["x"] is X
    assert "variance_epsilon" in (site.changed() or "")
    torch.testing.assert_close(site.run(ops.reference("rms_norm"), X), module(X))


def test_weight_and_weight_plus_one_are_told_apart() -> None:
    assert only_site(PlusOne(), X).binding.arguments["offset"] == "1.0"
    assert only_site(RMSNorm(), X).binding.arguments["offset"] == "0.0"


def test_the_epsilon_of_the_dtype_is_found() -> None:
    site = only_site(nn.RMSNorm(12, eps=None), X)
    assert "finfo" in site.binding.arguments["eps"]
    tiny = X * 1e-4
    torch.testing.assert_close(site.run(ops.reference("rms_norm"), tiny), F.rms_norm(tiny, (12,)))


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 1e-12])
def test_epsilons_far_below_the_inputs_are_told_apart(eps: float) -> None:
    class Literal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, (12,), eps=1e-5) if eps == 1e-5 else self.general(x)

        def general(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(x, (12,), eps=self.tiny)

    module = Literal()
    module.tiny = eps  # type: ignore[assignment]
    site = only_site(module, X)
    assert site.op == "layer_norm" and site.arguments(X)["eps"] == eps


def test_layer_norm_along_the_channels_of_an_image() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    module = ChannelsFirst()
    image = torch.randn(2, 6, 4, 3)
    site = only_site(module, image)
    assert site.op == "layer_norm" and "movedim" in site.binding.arguments["x"]
    torch.testing.assert_close(site.run(ops.reference("layer_norm"), image), module(image))


@pytest.mark.parametrize(
    ("activation", "name"),
    [(F.silu, "silu"), (F.gelu, "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (torch.relu, "relu")],
)
def test_gated_mlp_tells_activations_apart(activation: Any, name: str) -> None:
    module = MLP(activation, bias=True)
    site = only_site(module, X)
    assert site.op == "gated_mlp" and site.binding.arguments["activation"] == repr(name)
    assert site.binding.arguments["gate_weight"] == "self.one.weight"
    torch.testing.assert_close(site.run(ops.reference("gated_mlp"), X), module(X))


def test_gated_mlp_with_a_fused_and_swapped_projection() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(12, 40, bias=False)
            self.down = nn.Linear(20, 12, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up, gate = self.both(x).chunk(2, dim=-1)
            return self.down(up * F.silu(gate))

    module = Fused()
    site = only_site(module, X)
    assert site.op == "gated_mlp"
    assert site.binding.arguments["gate_weight"] == "self.both.weight.chunk(2)[1]"
    torch.testing.assert_close(site.run(ops.reference("gated_mlp"), X), module(X))


def test_linear_with_a_transposed_weight() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 7))
            self.bias = nn.Parameter(torch.randn(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x.view(-1, 12), self.weight).view(*x.shape[:-1], 7)

    assert only_site(Conv1D(), X).binding.arguments["weight"] == "self.weight.t()"
    assert only_site(nn.Linear(12, 7), X).op == "linear"


def test_add_rms_norm_in_either_order_of_results() -> None:
    class AddNorm(RMSNorm):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = x + residual
            return total, RMSNorm.forward(self, total)

    module = AddNorm()
    site = only_site(module, X, torch.randn_like(X))
    assert site.op == "add_rms_norm"
    residual = torch.randn_like(X)
    torch.testing.assert_close(site.run(ops.reference("add_rms_norm"), X, residual), module(X, residual))


def test_softmax_and_cross_entropy_modules() -> None:
    assert only_site(nn.Softmax(dim=1), X).arguments(X)["dim"] == 1
    logits, target = torch.randn(6, 9), torch.randint(0, 9, (6,))
    module = nn.CrossEntropyLoss(weight=torch.rand(9), label_smoothing=0.1, ignore_index=3)
    site = only_site(module, logits, target)
    assert site.op == "cross_entropy"
    torch.testing.assert_close(
        site.run(ops.reference("cross_entropy"), logits, target), module(logits, target)
    )


def test_recognition_leaves_no_trace() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm()
            self.batch = nn.BatchNorm1d(5)
            self.drop = nn.Dropout(0.5)
            self.log: list[int] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.log.append(1)
            return self.drop(self.batch(self.norm(x)))

    model = Model().train()
    fired: list[int] = []
    model.batch.register_forward_hook(lambda *_: fired.append(1))
    model(X).sum().backward()
    fired.clear()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    log = len(model.log)
    states = random.getstate(), torch.get_rng_state()
    keys = {name: sorted(vars(module)) for name, module in model.named_modules()}
    given = X.clone()
    found = recognised(model, given)
    assert found.of("rms_norm")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters()) if p.grad is not None)
    assert not fired and len(model.log) == log and torch.equal(given, X)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert keys == {name: sorted(vars(module)) for name, module in model.named_modules()}
    assert torch.is_grad_enabled() and model.training


def test_observing_keeps_the_fast_path_of_a_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True).eval()
    found = recognised(layer, X)
    # on the fast path the submodules never run, so nothing of theirs may be claimed
    assert not found.sites


def test_proofs_are_shared_by_layers_and_by_models() -> None:
    ops.forget_proofs()
    model = nn.Sequential(*(RMSNorm() for _ in range(12)))
    first = recognised(model, X)
    assert len(first.of("rms_norm")) == 12 and first.proofs == 1
    assert recognised(copy.deepcopy(model), X).proofs == 0
    model[3].variance_epsilon = 1e-3  # type: ignore[assignment]
    assert recognised(model, X).proofs == 1


def test_the_deadline_stops_proofs_and_says_so() -> None:
    ops.forget_proofs()
    found = recognised(RMSNorm(), X, deadline=0.0)
    assert not found.sites and "time" in found.left_alone[0][1]


def test_ops_that_are_asked_for_are_proved_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.ops import recognition
    from kpt.ops.claims import OutOfTime

    model = nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), RMSNorm()).eval()
    ops.forget_proofs()
    everything = recognised(model, X)
    assert {site.op for site in everything.sites} == {"linear", "layer_norm", "rms_norm"}
    ops.forget_proofs()
    again = recognised(model, X, first=("rms_norm",))
    assert [(site.path, site.op) for site in again.sites] == [(s.path, s.op) for s in everything.sites]

    ops.forget_proofs()
    original, begun = recognition.prove, []

    def only_one(captured: Any, *given: Any, **options: Any) -> Any:
        begun.append(captured.path)
        if len(begun) > 1:
            raise OutOfTime("the time for recognition was over")
        return original(captured, *given, **options)

    monkeypatch.setattr(recognition, "prove", only_one)
    found = recognised(model, X, first=("rms_norm",))
    assert [site.op for site in found.sites] == ["rms_norm"] and found.unfinished == len(begun) - 1 > 0


def test_large_weights_are_shrunk_for_the_proof() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Linear(1024, 4096, bias=False)
            self.down = nn.Linear(2048, 1024, bias=False)
            self.inner = 2048

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up(x).split(self.inner, dim=-1)
            return self.down(F.silu(gate) * up)

    from kpt.ops.capture import observe
    from kpt.ops.examples import Examples

    big = Big()
    assert only_site(big, torch.randn(1, 2, 1024)).op == "gated_mlp"
    captured = observe(big, [Call((torch.randn(1, 2, 1024),))]).modules[""]
    assert sum(p.numel() for p in Examples(captured).twin(torch.float64).parameters()) < 1 << 14


def test_a_failing_model_is_a_reason_and_no_error() -> None:
    found = recognised(RMSNorm(size=5), X)
    assert not found.sites and "raised RuntimeError" in found.left_alone[0][1]


def test_install_replaces_one_instance_and_undoes_it() -> None:
    module = nn.Sequential(RMSNorm(), RMSNorm())
    site = recognised(module, X).of("rms_norm")[0]
    before = module(X)
    twin = copy.deepcopy(module)
    undo = ops.install(twin, site, lambda x, weight, eps, offset: torch.zeros_like(x) + weight * 7)
    assert torch.equal(twin[0](X), torch.full_like(X, 7.0)) and torch.equal(module(X), before)
    undo()
    assert torch.equal(twin(X), before) and "forward" not in vars(twin[0])


def test_a_call_unlike_the_proof_is_a_mismatch() -> None:
    class Gated(RMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            out = super().forward(hidden_states)
            return out if gate is None else out * gate

    module = Gated()
    site = only_site(module, X)
    with pytest.raises(ops.SiteMismatch):
        site.run(ops.reference("rms_norm"), X, X)
    ops.install(module, site, ops.reference("rms_norm"))
    torch.testing.assert_close(module(X, X), Gated.forward(module, X, X))


def test_every_op_of_the_core_has_a_reference_with_its_signature() -> None:
    import inspect

    expected = {
        "linear", "layer_norm", "rms_norm", "add_rms_norm", "gated_mlp",
        "rope", "attention", "softmax", "cross_entropy",
    }  # fmt: skip
    specs = ops.catalogue()
    assert expected <= set(specs)
    for name in expected:
        names = list(inspect.signature(ops.reference(name)).parameters)
        assert specs[name].signature.startswith("(" + names[0]), name
    with pytest.raises(KeyError, match="rms_norm"):
        ops.reference("rms_nrom")


def test_an_op_of_a_plugin_joins_the_catalogue() -> None:
    from kpt.specs import OpSpec

    @dataclass(frozen=True)
    class Registered:
        spec: OpSpec

    class Registry:
        def specs(self, hook: str) -> tuple[Registered, ...]:
            home = f"{__name__}:" if ":" not in __name__ else ""
            spec = OpSpec("scale_by_pi", "(x) -> y", f"{home}scale_by_pi", f"{home}ScaleRecogniser")
            return (Registered(spec),) if hook == "kpt_ops" else ()

    import sys

    sys.modules.setdefault(__name__, sys.modules[scale_by_pi.__module__])

    class TimesPi(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * math.pi

    found = ops.recognise(TimesPi(), [Call((X,))], registry=Registry())
    assert [site.op for site in found.sites] == ["scale_by_pi"]
    assert "scale_by_pi" in ops.catalogue(Registry()) and "scale_by_pi" not in ops.catalogue()


def scale_by_pi(x: torch.Tensor) -> torch.Tensor:
    return x * math.pi


class ScaleRecogniser:
    def hypotheses(self, module: nn.Module, captured: Any) -> list[ops.Hypothesis]:
        return [ops.Hypothesis("scale_by_pi", {"x": captured.names[0]})]


def test_a_failed_backward_of_a_proof_is_not_reported_in_the_users_anomaly_mode():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2.0

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward")

    x = torch.ones(3, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = Fails.apply(x)
        with pytest.raises(RuntimeError, match="no backward"):
            gradients_of(out, [x])
        assert torch.is_anomaly_enabled()
    assert [str(warning.message) for warning in seen] == []


def test_a_sparse_buffer_is_kept_and_not_drawn_as_a_dense_matrix() -> None:
    """Its places would take 320 GB: where that much memory is promised, the process is killed for it."""
    nodes = 200_000

    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            edges = torch.tensor([[0, 1], [1, 0]])
            matrix = torch.sparse_coo_tensor(edges, torch.ones(2), (nodes, nodes), check_invariants=True)
            self.register_buffer("matrix", matrix)
            self.weight = nn.Parameter(torch.ones(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, (12,), self.weight, 1e-5) * self.matrix.dim() / 2

    assert only_site(Neighbours(), X).op == "rms_norm"
