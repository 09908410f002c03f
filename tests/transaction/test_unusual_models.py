"""Modules that are made or kept in unusual ways come back right: optimised, or untouched with the reason."""

from __future__ import annotations

import copy
import importlib
import io
import re
import sys
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

import fingerprints
import kpt
from fingerprints import fast_calls, optimized
from kpt.compiling import CompiledForward
from kpt.ops.clone import clone as clone_for_proof
from kpt.transaction import workspace
from slow_models import DerivedScale, DirectScale, Net, SlowScale, plugin


class Slots(torch.nn.Module):
    """Keeps an attribute outside of its dictionary."""

    __slots__ = ("factor", "unset")

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) * self.factor


class OwnNew(Slots):
    """Can't be made without its argument."""

    def __new__(cls, factor: float) -> OwnNew:
        return super().__new__(cls)

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor


class Static(torch.nn.Module):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2


class OfClass(torch.nn.Module):
    @classmethod
    def forward(cls, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 16), SlowScale(16))


MODELS = {
    "slots": Slots,
    "own __new__": lambda: OwnNew(3.0),
    "static method": Static,
    "class method": OfClass,
    "torch.fx": lambda: torch.fx.symbolic_trace(layers()),
    "torch.fx inside": lambda: torch.nn.Sequential(torch.fx.symbolic_trace(layers()), SlowScale(16)),
    "data parallel": lambda: torch.nn.DataParallel(layers()),
    "scripted": lambda: torch.jit.script(layers()),
    "traced": lambda: torch.jit.trace(layers(), torch.randn(3, 16)),
    "lazy": lambda: torch.nn.Sequential(torch.nn.LazyLinear(16), SlowScale(16)),
}


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_outputs_stay_and_nothing_fails(name: str, deferred: bool, recwarn: Any) -> None:
    model: Any = MODELS[name]().eval()
    example = torch.randn(8, 16)
    with torch.no_grad():
        expected = None if name == "lazy" else model(example)
        kpt.optimize(
            model, None if deferred else example, plugins=[plugin(DirectScale)], budget=20.0, cache=False
        )
        first = model(example)
        receipt = kpt.report(model)
        torch.testing.assert_close(first, first if expected is None else expected)
        torch.testing.assert_close(model(example), first)
        kpt.restore(kpt.refresh(model))
        torch.testing.assert_close(model(example), first)
    assert receipt.optimized or receipt.reason
    assert not [w for w in recwarn if "was not optimised" in str(w.message)]
    if name in ("slots", "own __new__", "torch.fx inside", "data parallel"):
        assert receipt.optimized, receipt.reason


@pytest.mark.parametrize("copied", [workspace.clone, clone_for_proof])
@pytest.mark.parametrize("name", ["slots", "own __new__", "torch.fx"])
def test_copies_are_of_the_same_class_and_compute_the_same(copied: Any, name: str) -> None:
    model: Any = MODELS[name]().eval()
    twin = copied(model)
    assert type(twin) is type(model)
    example = torch.randn(8, 16)
    assert torch.equal(twin(example), model(example))


def test_weights_that_are_not_there_yet_are_a_reason() -> None:
    model = layers().to("meta").eval()
    assert kpt.optimize(model, torch.randn(3, 16), plugins=[plugin(DirectScale)], cache=False) is model
    assert "meta device" in kpt.report(model).reason
    lazy = MODELS["lazy"]().eval()
    kpt.optimize(lazy, torch.randn(3, 16), plugins=[plugin(DirectScale)], cache=False)
    assert "gets its shape from the first call" in kpt.report(lazy).reason
    assert isinstance(lazy[0].weight, torch.nn.UninitializedParameter)


def test_a_deferred_run_that_failed_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpt.transaction import api

    def fails(*args: Any) -> None:
        raise LookupError("nothing works")

    monkeypatch.setattr(api, "execute", fails)
    model = kpt.optimize(Net().eval(), plugins=[plugin(DirectScale)], cache=False)
    with pytest.warns(UserWarning, match="nothing works"):
        model(torch.randn(8, 16))
    assert "LookupError: nothing works" in kpt.report(model).reason


class TakesAnObject(torch.nn.Module):
    """Takes what the guard has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = SlowScale(16)

    def forward(self, box: Any) -> torch.Tensor:
        return self.slow(box.x)


class Box:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def test_an_argument_that_no_call_is_served_with_is_named() -> None:
    model = TakesAnObject().eval()
    kpt.optimize(model, (Box(torch.randn(8, 16)),), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert not kpt.report(model).optimized
    receipt = kpt.report(model)
    assert "'box' has an unsupported type Box" in receipt.reason
    assert not receipt.searched and not receipt.rejected  # known before anything is tried


LIBRARY = """
import torch
from torch.nn.utils import prune
from slow_models import net

collected = None

def collect(module, args, output):
    if collected is not None:
        collected.append(output)

def double(module, args, output):
    "A tool for users, which this library registers nowhere."
    heard.append(module)
    return output * 2.0

heard = []

class Collects(torch.nn.Module):
    hooked = False

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, inner=False):
        global collected
        if inner and not self.hooked:
            self.net.slow.register_forward_hook(collect)
            self.hooked = True
        collected = [] if inner else None
        result, mine = self.net(x), collected
        collected = None
        return result, mine
"""


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A package that is installed, as far as anybody can tell, with a model that hooks its own modules."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "collecting_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("collecting_library")
    sys.modules.pop("collecting_library")


@pytest.mark.parametrize("called_before", [False, True])
def test_hooks_that_a_librarys_forward_registers_belong_to_it(library, called_before):
    model, x = library.Collects().eval(), torch.randn(32, 16)
    twin = copy.deepcopy(model)
    if called_before:
        model(x, inner=True)
    optimized(model, {"x": x, "inner": True}, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        result, collected = model(x, inner=True)
        expected, theirs = twin(x, inner=True)
    assert fast_calls(model) == 1 and len(collected) == 1
    assert torch.equal(result, expected) and torch.equal(collected[0], theirs[0])
    assert bool(model.net.slow._forward_hooks) is called_before


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (torch.nn.utils.weight_norm, "use torch.nn.utils.parametrizations.weight_norm"),
        (torch.nn.utils.spectral_norm, "use torch.nn.utils.parametrizations.spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_compute_a_weight_come_with_what_does_it_without(change, advice: str):
    model = torch.nn.Sequential(change(torch.nn.Linear(16, 16)), torch.nn.ReLU()).eval()
    x = torch.randn(4, 16)
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=5.0, cache=False)
    reason = kpt.report(model).reason
    assert "0 has a hook (forward_pre_hooks)" in reason and advice in reason
    assert torch.equal(model(x), expected)


def test_a_users_hook_may_be_a_function_of_the_models_library(library):
    model, x = library.Collects().eval(), torch.randn(32, 16)
    handle = model.net.slow.register_forward_hook(library.double)
    expected = model(x)[0]
    library.heard.clear()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "net.slow has a hook (forward_hooks)" in receipt.reason
    assert library.heard == []
    assert torch.equal(model(x)[0], expected) and library.heard == [model.net.slow]
    handle.remove()
    assert kpt.report(optimized(model, x, plugins=[plugin(DirectScale)])).optimized


class Noisy(Net):
    """Draws from a generator of its own, and counts calls where ``counts``."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.calls = 0 if counts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls is not None:
            self.calls += 1
        return super().forward(x) + torch.rand(x.shape[0], 1, generator=self.generator)


@pytest.mark.parametrize("counts", [False, True])
def test_a_generator_that_a_model_holds_goes_on_where_it_was(counts: bool) -> None:
    model, x = Noisy(counts).eval(), torch.randn(32, 16)
    before = model.generator.get_state()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert torch.equal(model.generator.get_state(), before)
    assert not counts or "assigns calls" in kpt.report(model).reason


class Numbered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1000))
        self.unread = iter(range(1000))
        self.log = io.StringIO()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.flush()
        return super().forward(x) + next(self.numbers)


def test_what_calls_move_on_for_good_is_a_reason() -> None:
    model = Numbered().eval()
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "numbers is a range_iterator, which calls move on" in kpt.report(model).reason
    assert next(model.numbers) == 0


def test_a_submodule_that_was_compiled_in_place_is_named() -> None:
    model, x = Net().eval(), torch.randn(32, 16)
    model.slow.compile(backend="eager")
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "compile() was called on slow" in receipt.reason
    assert torch.equal(model(x), expected)
    model.slow._compiled_call_impl = None
    assert kpt.report(optimized(model, x, plugins=[plugin(DirectScale)])).optimized


class AnswersItself(Net):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class AnswersThroughForward(Net):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x)


def test_a_class_that_answers_calls_without_its_forward_is_named() -> None:
    x = torch.randn(32, 16)
    model = kpt.optimize(AnswersItself().eval(), x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and "AnswersItself has a __call__ of its own" in receipt.reason
    assert not receipt.searched
    other = optimized(AnswersThroughForward().eval(), x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        other(x)
    assert fast_calls(other) == 1


def test_a_copy_of_a_compiled_model_runs_the_copys_modules_when_it_is_traced():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).eval()
    example = torch.randn(2, 4)
    copied = workspace.clone(workspace.clone(torch.compile(model, backend="eager")))
    copied.get_submodule("_orig_mod.0").weight = torch.nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        assert not copied.forward(example).any()
        # What the compiler would compile: the copy, and not the model that it was made of.
        assert not CompiledForward(copied.forward, backend="eager")(example).any()
        assert model(example).any()


def test_a_model_that_is_called_without_a_forward_comes_back_with_the_reason():
    class OnlyCall(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow = SlowScale(16)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.slow(x)

    for examples in ((torch.randn(3, 16),), ()):
        model = OnlyCall().eval()
        kpt.optimize(model, *examples, plugins=[plugin(DirectScale)], cache=False)
        assert model(torch.randn(3, 16)).shape == (3, 16)
        assert "OnlyCall has no forward" in kpt.report(model).reason
        assert fingerprints.ours(model) == []


class Neighbours(torch.nn.Module):
    """Adds up neighbours by a sparse matrix that no memory would hold dense."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        nodes = 200_000
        edges = torch.randint(0, nodes, (2, 64), generator=torch.Generator().manual_seed(0))
        matrix = torch.sparse_coo_tensor(edges, torch.rand(64), (nodes, nodes)).coalesce()
        by_layout = {"coo": lambda: matrix, "csr": matrix.to_sparse_csr, "csc": matrix.to_sparse_csc}
        small = {"mkldnn": lambda: torch.rand(4, 4).to_mkldnn()}
        self.register_buffer("matrix", {**by_layout, **small}[layout](), persistent=False)
        self.slow = SlowScale(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slow(x) + self.matrix.shape[0]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "mkldnn"])
@pytest.mark.filterwarnings("ignore:.*beta state.*")
def test_buffers_without_strides_are_compared_as_they_are(layout: str) -> None:
    model, x = Neighbours(layout).eval(), torch.randn(8, 16)
    matrix, expected = model.matrix, model(x)
    optimized(model, x, plugins=[plugin(DirectScale)])
    with torch.no_grad():
        assert torch.equal(model(x), expected) and fast_calls(model) == 1
    assert kpt.restore(model).matrix is matrix


@pytest.mark.filterwarnings("ignore:.*beta state.*")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_buffer_that_calls_write_to_is_put_back(layout: str) -> None:
    class Ages(Neighbours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = self.matrix._values() if layout == "coo" else self.matrix.values()
            values.add_(1.0)
            return super().forward(x) * values.sum()

    model, x = Ages(layout).eval(), torch.randn(8, 16)
    before = model.matrix.clone()
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert torch.equal(_values(model.matrix), _values(before)), kpt.report(model).reason


def _values(matrix: torch.Tensor) -> torch.Tensor:
    return matrix._values() if matrix.layout is torch.sparse_coo else matrix.values()


class EqualToAll(Net):
    """Says of each two of its kind that they are equal, as classes compared by their settings do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EqualToAll)

    def __hash__(self) -> int:
        return 7


def test_models_that_call_themselves_equal_have_reports_and_watches_of_their_own() -> None:
    x = torch.randn(8, 16)
    first, second, never = EqualToAll().eval(), EqualToAll().eval(), EqualToAll().eval()
    optimized(first, x, plugins=[plugin(DirectScale)])
    kpt.optimize(second, x, plugins=[plugin()], cache=False)
    assert kpt.report(first).optimized and not kpt.report(second).optimized
    with pytest.raises(ValueError, match="was not optimised"):
        kpt.report(never)
    optimized(second, x, plugins=[plugin(DirectScale)])
    first.double()
    with torch.no_grad():
        first(x.double())
        second(x)
    assert fast_calls(first) == 0 and fast_calls(second) == 1
    assert any("moved or converted" in reason for reason in fingerprints.fallbacks(first))


class Trainable(Net):
    """Tells optimizers of its last layer only, by `parameters`."""

    def parameters(self, recurse: bool = True) -> Any:
        return self.last.parameters(recurse)


class NamesNoBuffers(Net):
    def named_buffers(self, *args: Any, **options: Any) -> Any:
        return iter(())


class ShowsNoParts(Net):
    def named_modules(self, *args: Any, **options: Any) -> Any:
        yield "", self


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Trainable, r"Trainable has parameters\(\) or named_parameters\(\).*first.weight"),
        (NamesNoBuffers, r"named_buffers\(\).*norm.running_mean"),
        (ShowsNoParts, r"named_modules\(\) of its own, which leaves out first"),
    ],
)
def test_a_model_that_hides_parts_of_itself_comes_back_with_the_reason(cls: type, said: str) -> None:
    """Copies of a weight that nobody tells of would go stale unnoticed."""
    model, x = cls().train(False), torch.randn(8, 16)
    for part in (model.first, model.slow, model.norm, model.dropout, model.last):
        part.training = False
    expected = model(x)
    kpt.optimize(model, x, plugins=[plugin(DerivedScale)], budget=20.0, cache=False)
    receipt = kpt.report(model)
    assert not receipt.optimized and re.search(said, receipt.reason), receipt.reason
    assert torch.equal(model(x), expected)


class ForwardIsAProperty(Net):
    @property
    def forward(self) -> Any:
        return lambda x: Net.forward(self, x)


def test_a_forward_that_no_other_gets_past_is_a_reason() -> None:
    model, x = ForwardIsAProperty().eval(), torch.randn(8, 16)
    kpt.optimize(model, x, plugins=[plugin(DirectScale)], budget=20.0, cache=False)
    assert "is a property" in kpt.report(model).reason and not kpt.report(model).searched
