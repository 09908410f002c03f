"""The key of a recipe: the same all through a process, whatever kpt and the user did meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import hostile_passes
import kpt
from kpt import profiles
from kpt.judge.calls import as_calls
from kpt.judge.draws import InputSpec
from kpt.plugins import Registry, registry
from kpt.transaction import recipe
from kpt.transaction.budget import Budget
from kpt.transaction.observe import observe
from slow_models import DirectScale, Net, net, plugin

EXAMPLE = torch.randn(32, 16)
PLUGINS = [plugin(DirectScale, hostile_passes.OnePercent)]


class Known(KeyboardInterrupt):
    """Ends a run as Ctrl-C does, once its key is known."""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The key of every run, in order."""
    found: list[str] = []
    original = recipe.key_of

    def noted(*args: object) -> str:
        found.append(original(*args))  # type: ignore[arg-type]
        if _only_keys:
            raise Known
        return found[-1]

    monkeypatch.setattr(recipe, "key_of", noted)
    yield found


def optimized(model: Net, example: torch.Tensor = EXAMPLE, **options: object) -> Net:
    return kpt.optimize(model, example, **{"plugins": PLUGINS, "budget": 6.0, "cache": False, **options})


#: Holds something while runs are to end with their key: what they would search then says nothing of it.
_only_keys: list[bool] = []


def keyed(model: Net, example: torch.Tensor = EXAMPLE, **options: object) -> None:
    """A run as far as its key."""
    _only_keys.append(True)
    try:
        with pytest.raises(Known):
            optimized(model, example, **options)
    finally:
        _only_keys.pop()


def nothing(model: Net) -> None:
    """Another model of the same kind."""


def calls(model: Net) -> None:
    with torch.no_grad():
        model(EXAMPLE)
        model(EXAMPLE[:3])


def a_training_step(model: Net) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    model(EXAMPLE).square().mean().backward()
    optimizer.step()
    model.eval()


def a_copy(model: Net) -> None:
    import copy

    kpt.restore(copy.deepcopy(model))


def a_compilation(model: Net) -> None:
    torch.compile(kpt.restore(model), backend="aot_eager")(EXAMPLE)


def all_plugins(model: Net) -> None:
    """A search with what is installed here, compilers and thread counts included."""
    kpt.optimize(net(), EXAMPLE, budget=10.0, cache=False)


EVENTS: list[Callable[[Net], object]] = [
    nothing, calls, a_training_step, a_copy, kpt.restore, kpt.refresh, a_compilation, all_plugins
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_the_key_of_a_model_stays_the_same(event, keys):
    model = optimized(net())
    event(model)
    keyed(model)
    keyed(net())
    mine = [keys[0], *keys[-2:]]
    assert len(set(mine)) == 1, mine


def test_the_key_stays_the_same_with_installed_plugins(keys):
    """Measuring the hardware and loading compilers come between the first key and the second."""
    kpt.optimize(net(), EXAMPLE, budget=8.0, cache=False)
    keyed(net(), plugins=None)
    assert keys[0] == keys[1]


def test_a_file_that_is_edited_gives_another_key(tmp_path, monkeypatch, keys):
    """One way to a miss within one process: code is read from its file whenever a run starts."""
    (tmp_path / "edited_model.py").write_text(
        "from slow_models import Net as Base\n\nclass Net(Base):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import edited_model

    keyed(edited_model.Net().eval())
    (tmp_path / "edited_model.py").write_text(
        "from slow_models import Net as Base\n\nclass Net(Base):\n    x = 1\n"
    )
    keyed(edited_model.Net().eval())
    assert keys[0] != keys[1]


def test_other_values_of_the_same_form_have_the_same_key(keys):
    """Each process brings examples of its own."""
    dynamic = {"x": {0: "batch"}}
    for example in (EXAMPLE, EXAMPLE + 1, torch.randn(32, 16) * 3):
        keyed(net(), example=example)
    assert len(set(keys)) == 1
    for rows in (32, 20, 17):
        keyed(net(), example=torch.randn(rows, 16), dynamic_shapes=dynamic)
    assert len(set(keys)) == 2


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (torch.randn(33, 16), {}),
        (torch.randn(32, 16).half(), {}),
        (torch.randn(16, 32).t(), {}),
        (torch.ones(32, 16), {}),
        (torch.randn(32, 16), {"dynamic_shapes": {"x": {0: "batch"}}}),
        (torch.randn(300, 16), {"dynamic_shapes": {"x": {0: "batch"}}}),
        (torch.randn(32, 16), {"dynamic_shapes": {"x": {0: ("batch", 1, 512)}}}),
    ],
    ids=["size", "dtype", "strides", "form", "dynamic", "magnitude", "range"],
)
def test_inputs_of_another_kind_have_a_key_of_their_own(example, options, keys):
    keyed(net())
    keyed(net(), example=torch.randn(30, 16), dynamic_shapes={"x": {0: "rows"}})
    keyed(net().to(example.dtype), example=example, **options)
    assert len(set(keys)) == 3


def test_a_base_class_that_is_edited_gives_another_key(tmp_path, monkeypatch, keys):
    """A model's forward is often that of a class it inherits from."""
    module = tmp_path / "edited_base.py"
    text = "from slow_models import Net\n\nclass Base(Net):\n    x = {}\n\nclass Own(Base):\n    pass\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    module.write_text(text.format(1))
    import edited_base

    keyed(edited_base.Own().eval())
    keyed(edited_base.Own().eval())
    module.write_text(text.format(2))
    keyed(edited_base.Own().eval())
    assert keys[0] == keys[1] != keys[2]


def of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)  # the fixture for all tests of this folder puts it back


def of_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1000}, raising=False)


def of_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)


def of_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)


def of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "99.0")


def of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")


def of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Registry.fingerprint
    monkeypatch.setattr(Registry, "fingerprint", lambda self: {**original(self), "added": "1.0"})


SURROUNDINGS = [of_threads, of_affinity, of_world_size, of_determinism, of_torch, of_a_library, of_a_plugin]


@pytest.mark.parametrize("change", SURROUNDINGS, ids=lambda change: change.__name__)
def test_other_surroundings_give_another_key(change, monkeypatch):
    model = net()
    before, again = key_of(model), key_of(model)
    try:
        with monkeypatch.context() as patch:
            change(patch)
            changed = key_of(model)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    assert before == again == key_of(model)
    assert changed != before


def test_each_adapter_and_which_is_active_give_another_key():
    peft = pytest.importorskip("peft")

    def config(rank: int) -> object:
        return peft.LoraConfig(r=rank, target_modules=["first"])

    plain = key_of(net())
    model = peft.get_peft_model(net(), config(2)).eval()
    found = [plain, key_of(model)]
    model.add_adapter("second", config(2))
    found.append(key_of(model))
    model.set_adapter("second")
    found.append(key_of(model))
    with model.disable_adapter():
        found.append(key_of(model))
    assert len(set(found)) == len(found)
    assert key_of(model) == found[3]


def key_of(model: torch.nn.Module) -> str:
    """The key of a run, without the run."""
    calls = as_calls(EXAMPLE)
    observation, _ = observe(
        model,
        calls,
        InputSpec.from_calls(calls, None, model.forward),
        level="production",
        objective="latency",
        hardware=profiles.hardware("cpu", measure=False),
        registry=registry(PLUGINS),
        deadline=Budget(60.0),
    )
    return recipe.key_of(observation, registry(PLUGINS), {})
