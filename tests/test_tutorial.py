"""The code of docs/writing-a-plugin.md does what the page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import kpt
from kpt import ops

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "plugin_tutorial"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


class SpelledOut(torch.nn.Module):
    """An RMS norm as users write it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


def test_the_hooks_module_imports_neither_torch_nor_the_behaviour() -> None:
    import subprocess

    script = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import kpt_plugin_tutorial.hooks;"
        "sys.exit('torch' in sys.modules or 'kpt_plugin_tutorial.kernels' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.mark.parametrize(("offset", "hidden"), [(0.0, 33), (1.0, 33), (0.0, 16384)])
def test_the_kernel_equals_the_reference_of_its_op(offset: float, hidden: int) -> None:
    from kpt_plugin_tutorial.kernels import rms_norm

    x, weight = torch.randn(3, 7, hidden, dtype=torch.float64), torch.randn(hidden, dtype=torch.float64)
    expected = ops.reference("rms_norm")(x, weight, 1e-5, offset)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset), expected)


def test_the_kernel_refuses_what_it_was_not_tested_on() -> None:
    from types import SimpleNamespace

    from kpt_plugin_tutorial.kernels import supports

    def site(hidden: int) -> SimpleNamespace:
        return SimpleNamespace(examples=[SimpleNamespace(shapes={"x": (2, hidden), "weight": (hidden,)})])

    assert supports(site(16384)) is None
    assert "20000" in supports(site(20000))


def test_the_kernel_is_judged_where_a_model_spells_the_norm_out() -> None:
    from kpt_plugin_tutorial import hooks

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), SpelledOut(64)).eval()
    inputs = torch.randn(16, 64)
    expected = model(inputs)
    receipt = kpt.report(kpt.optimize(model, inputs, level="exact", plugins=[hooks], budget=30, cache=False))
    entries = [entry for entry in [*receipt.accepted, *receipt.rejected] if "rms_norm" in entry.name]
    assert len(entries) == 1
    # Whether it pays is the machine's business; that it is right is not.
    assert entries[0].rule in {"kept", "slower", "budget"}, entries[0].reason
    torch.testing.assert_close(model(inputs), expected)


def test_the_pass_folds_every_batch_norm_and_leaves_the_model_alone() -> None:
    from kpt_plugin_tutorial.folding import Absorbed, FoldBatchNorm, pairs
    from try_it import network

    torch.manual_seed(0)
    model = network()
    assert len(list(pairs(model))) == 3
    inputs = torch.randn(2, 3, 16, 16)
    expected, state = model(inputs), {name: value.clone() for name, value in model.state_dict().items()}
    undo = FoldBatchNorm().apply(model, None)
    assert sum(isinstance(module, Absorbed) for module in model.modules()) == 3
    assert FoldBatchNorm().verify_applied(model)
    torch.testing.assert_close(model(inputs), expected)
    undo()
    assert not FoldBatchNorm().verify_applied(model)
    assert torch.equal(model(inputs), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_pass_goes_through_the_whole_transaction() -> None:
    from kpt_plugin_tutorial import hooks
    from try_it import network

    torch.manual_seed(0)
    model, inputs = network(), torch.randn(1, 3, 32, 32)
    expected = model(inputs)
    receipt = kpt.report(kpt.optimize(model, inputs, level="exact", plugins=[hooks], budget=30, cache=False))
    entries = {entry.name: entry for entry in [*receipt.accepted, *receipt.rejected]}
    assert entries["tutorial.fold_batch_norm"].rule in {"kept", "slower"}
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(kpt.restore(model)(inputs), expected)


def test_a_model_without_pairs_is_skipped_with_the_reason() -> None:
    from kpt_plugin_tutorial import hooks

    model = torch.nn.Linear(8, 8).eval()
    receipt = kpt.report(kpt.optimize(model, torch.randn(2, 8), plugins=[hooks], budget=30, cache=False))
    reasons = {skip["name"]: skip["reason"] for skip in receipt.skipped}
    assert "no batch norm" in reasons["tutorial.fold_batch_norm"]
