"""CompiledForward: values, counts, sealing, dynamic dimensions, guards and what is left behind."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import torch

from kpt import compiling
from kpt.compiling import CapturedForward, CompiledForward, executions_of_thread


class Branchy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 8)
        self.second = torch.nn.Linear(8, 3)

    def forward(self, x, scale=1.0, mask=None):
        hidden = torch.relu(self.first(x)) * scale
        if mask is not None:
            hidden = hidden * mask
        return {"out": self.second(hidden), "extras": (hidden, [scale])}


@pytest.fixture
def model() -> Branchy:
    torch.manual_seed(0)
    return Branchy().eval()


def compiled(model: torch.nn.Module, **options) -> CompiledForward:
    return CompiledForward(model.forward, **{"backend": "aot_eager", **options})


def same(left, right) -> None:
    assert type(left) is type(right)
    torch.testing.assert_close(left["out"], right["out"])
    torch.testing.assert_close(left["extras"][0], right["extras"][0])
    assert left["extras"][1] == right["extras"][1]


@torch.no_grad()
def test_values_structure_and_counts_follow_the_original(model):
    forward = compiled(model)
    for _ in range(3):
        x = torch.randn(4, 6)
        same(forward(x), model(x))
    same(forward(x, scale=2.0), model(x, scale=2.0))
    same(forward(x, mask=torch.ones(8)), model(x, mask=torch.ones(8)))
    assert (forward.graphs, forward.executions, forward.misses) == (3, 5, 0)


@torch.no_grad()
def test_a_traced_module_is_compiled_where_it_stands():
    """dynamo reads ``module.forward.__code__`` of a graph module, which is the compiled forward itself."""
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU()))
    x = torch.randn(4, 6)
    expected = traced(x)
    traced.forward = CompiledForward(traced.forward, backend="eager")
    assert torch.allclose(traced(x), expected) and traced.forward.executions == 1


@torch.no_grad()
def test_sealed_never_compiles_and_counts_misses(model):
    forward = compiled(model)
    forward(torch.randn(4, 6))
    forward.seal()
    for rows in (4, 5, 6):
        x = torch.randn(rows, 6)
        same(forward(x), model(x))
    assert (forward.graphs, forward.executions, forward.misses) == (1, 2, 2)


@torch.no_grad()
def test_strides_dtype_and_identity_of_inputs_select_compiled_code():
    class Sum(torch.nn.Module):
        def forward(self, a, b):
            return a.contiguous() + 2 * b

    module = Sum()
    forward = compiled(module)
    a = torch.randn(4, 4)
    for first, second in ((a, a.clone()), (a, a), (a.t(), a), (a.double(), a), (a, a.clone())):
        torch.testing.assert_close(forward(first, second), module(first, second))
    assert forward.misses == 0


class _Pairs(torch.nn.Module):
    """What it gives depends on which tensors are one; it returns an input, too."""

    def forward(self, q, k, more):
        return {"out": q * (2 if q is k else 3) + k * (5 if more[0] is q else 7), "same": q}


@pytest.mark.parametrize("one", [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2)])
def test_inputs_that_require_a_gradient_are_served_where_none_is_recorded(one):
    forward = CompiledForward(_Pairs().forward, backend="eager")

    def call(function, tensors):
        q, k, other = (tensors[index] for index in one)
        return function(q, k, [other])

    with torch.no_grad():
        call(forward, [torch.randn(4) for _ in range(3)])
    forward.seal()
    known = forward.executions
    tensors = [torch.randn(4, requires_grad=True) for _ in range(3)]
    for number in (1, 2):
        with torch.no_grad():
            mine, true = call(forward, tensors), call(_Pairs().forward, tensors)
        assert torch.equal(mine["out"], true["out"]) and not mine["out"].requires_grad
        assert mine["same"] is tensors[0]
        assert forward.executions == known + number and forward.misses == 0
    assert call(forward, tensors)["out"].requires_grad and forward.misses == 1


def test_grad_mode_is_part_of_the_structure(model):
    forward = compiled(model)
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert not forward(x)["out"].requires_grad
    assert forward(x)["out"].requires_grad
    with torch.inference_mode():
        assert forward(x)["out"].is_inference()


@torch.no_grad()
def test_declared_dimensions_share_one_graph(model):
    forward = compiled(model, dynamic_dims={"x": {0: "batch"}})
    forward(torch.randn(7, 6))
    forward(x=torch.randn(7, 6))
    forward.seal()
    for rows in range(2, 60):
        x = torch.randn(rows, 6)
        same(forward(x=x) if rows % 2 else forward(x), model(x))
    assert (forward.graphs, forward.misses) == (2, 0)
    assert "_dynamo_dynamic_indices" not in x.__dict__


@torch.no_grad()
def test_equal_example_sizes_are_not_taken_for_one_dimension():
    class Scores(torch.nn.Module):
        def forward(self, ids, other):
            return ids.float().sum(-1) + other.sum()

    module = Scores()
    forward = compiled(module, dynamic_dims={"ids": {0: "batch", 1: "sequence"}, "other": {0: "rows"}})
    forward(torch.ones(5, 5, dtype=torch.long), torch.ones(5))
    forward.seal()
    for batch, sequence, rows in ((2, 3, 4), (9, 2, 5)):
        ids, other = torch.ones(batch, sequence, dtype=torch.long), torch.ones(rows)
        torch.testing.assert_close(forward(ids, other), module(ids, other))
    assert forward.misses == 0


@torch.no_grad()
def test_size_one_of_a_dynamic_dimension_gets_its_own_graph(model):
    forward = compiled(model, dynamic_dims={"x": {0: "batch"}})
    for rows in (1, 3, 5, 1):
        x = torch.randn(rows, 6)
        same(forward(x), model(x))
    assert forward.graphs == 2


def test_training_gradients_reach_live_parameters(model):
    forward = compiled(model)
    x = torch.randn(4, 6)
    forward(x)["out"].sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x)["out"].sum().backward()
    for mine, theirs in zip(got, model.parameters()):
        torch.testing.assert_close(mine, theirs.grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    same(forward(x), model(x))
    assert forward.graphs == 1


@torch.no_grad()
def test_unknown_argument_types_are_checked_by_the_guards_on_each_call():
    class Options:
        def __init__(self, factor: float) -> None:
            self.factor = factor

    class Module(torch.nn.Module):
        def forward(self, x, options):
            return torch.sin(x) * options.factor

    module = Module()
    forward = compiled(module)
    x = torch.randn(3)
    for factor in (2.0, 3.0, 2.0):
        torch.testing.assert_close(forward(x, Options(factor)), module(x, Options(factor)))
    assert forward.graphs == 2
    forward.seal()
    torch.testing.assert_close(forward(x, Options(5.0)), module(x, Options(5.0)))
    assert forward.misses == 1


@torch.no_grad()
def test_graph_pass_sees_and_changes_the_captured_graph(model):
    seen = []

    def relu_to_sigmoid(graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        for node in graph.graph.nodes:
            if node.target is torch.relu:
                node.target = torch.sigmoid
                seen.append(len(example_inputs))
        graph.recompile()
        return graph

    forward = compiled(model, graph_pass=relu_to_sigmoid)
    x = torch.randn(4, 6)
    torch.testing.assert_close(forward(x)["out"], model.second(torch.sigmoid(model.first(x))))
    assert seen


@torch.no_grad()
def test_settings_hold_while_compiling_only(model):
    import torch._inductor.config as inductor_config

    seen = []

    def backend(graph, example_inputs):
        seen.append(inductor_config.freezing)
        return graph.forward

    before = inductor_config.freezing
    compiled(model, backend=backend, inductor_config={"freezing": not before})(torch.randn(2, 6))
    assert seen == [not before]
    assert inductor_config.freezing == before


@torch.no_grad()
def test_a_graph_break_is_an_error_and_leaves_dynamo_usable(model):
    class Breaks(torch.nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x + 1
            return x - 1

    with pytest.raises(Exception, match="(?i)data-dependent|graph break|unsupported"):
        compiled(Breaks())(torch.randn(3))
    x = torch.randn(3, 6)
    same(compiled(model)(x), model(x))


def test_collect_names_what_was_made_inside(model):
    before = compiled(model)
    with compiling.collect() as outer:
        first = compiled(model)
        with compiling.collect() as inner:
            second = compiled(model)
    assert inner == [second]
    assert outer == [first, second]
    assert before not in outer


@torch.no_grad()
def test_dispose_frees_code_and_constants():
    alive = []

    def run() -> None:
        module = Branchy().eval()
        forward = compiled(module)
        forward(torch.randn(4, 6))
        alive.append(weakref.ref(module))
        alive.append(weakref.ref(forward))
        forward.dispose()
        assert forward.misses == 0

    for _ in range(3):
        run()
    gc.collect()
    assert [reference() for reference in alive] == [None] * 6


@torch.no_grad()
def test_disposed_runs_the_original(model):
    forward = compiled(model)
    x = torch.randn(4, 6)
    forward(x)
    forward.dispose()
    same(forward(x), model(x))
    assert forward.misses == 1


@torch.no_grad()
def test_calls_from_threads_agree(model):
    forward = compiled(model)
    errors: list[BaseException] = []
    x = torch.randn(4, 6)
    expected = model(x)["out"]

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(forward(x)["out"], expected)
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert forward.graphs == 1


def test_what_torch_logs_of_a_failure_comes_with_the_error(model, capfd):
    """A search tries what may not compile: its receipt says why, and nothing is written beside it."""

    def failing(graph, inputs):
        logging.getLogger("torch._guards").error("Error while creating guard:\n%s", "Name: the_guard")
        raise ValueError("no")

    log = logging.getLogger("torch._guards")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    try:
        with torch.no_grad(), pytest.raises(Exception, match="no") as caught:
            CompiledForward(model.forward, backend=failing)(torch.randn(4, 6))
        assert any("the_guard" in note for note in caught.value.__notes__)
        assert "the_guard" not in "".join(capfd.readouterr())
        log.error("spoken")
        assert not handler.filters
    finally:
        log.removeHandler(handler)
    assert "spoken" in "".join(capfd.readouterr())


def test_nothing_of_a_disposed_graph_stays_in_memory_although_an_input_is_a_view(model):
    def alive():
        gc.collect()
        return sum(
            isinstance(item, torch.fx.experimental.symbolic_shapes.ShapeEnv) for item in gc.get_objects()
        )

    before = alive()
    forward = CompiledForward(model.forward, backend="eager")
    with torch.no_grad():
        forward(torch.randn(24).view(4, 6))
    assert forward.graphs == 1
    forward.dispose()
    del forward
    assert alive() <= before


def test_a_captured_forward_runs_its_graph_as_the_pass_left_it(model):
    seen = []

    def note(graph, inputs):
        seen.append(len(inputs))
        return graph

    forward, x = CapturedForward(model.forward, note), torch.randn(3, 6)
    with torch.no_grad():
        expected = model(x)["out"]
        assert torch.equal(forward(x)["out"], expected)
        assert (len(seen), forward.executions, forward.idle) == (1, 1, False)
        outer = CompiledForward(forward, backend="eager")
        assert forward.idle
        assert torch.equal(outer(x)["out"], expected) and torch.equal(forward(x)["out"], expected)
    assert (len(seen), forward.executions, outer.executions) == (2, 1, 1)


@torch.no_grad()
def test_code_for_zero_does_not_serve_minus_zero():
    """The two are equal, also to dynamo's guards; what is divided by them is not."""

    def divided(x, options, by=1.0):
        return x / torch.full_like(x, options["by"] * by)

    x = torch.ones(3)
    forward = CompiledForward(divided, backend="eager")
    for by in (0.0, -0.0, 0.0):
        assert torch.equal(forward(x, {"by": by}), divided(x, {"by": by}))
        assert torch.equal(forward(x, {"by": 1.0}, by), divided(x, {"by": 1.0}, by))
    assert (forward.graphs, forward.misses) == (2, 2)
    forward.seal()
    assert torch.equal(forward(x, {"by": -0.0}), divided(x, {"by": -0.0}))
    assert forward.misses == 3


@torch.no_grad()
def test_a_thread_counts_what_it_ran_itself(model):
    forward = compiled(model)
    x = torch.randn(4, 6)
    before = executions_of_thread()
    forward(x)
    thread = threading.Thread(target=forward, args=(x,))
    thread.start()
    thread.join(60)
    assert forward.executions == 2 and executions_of_thread() == before + 1


@torch.no_grad()
def test_a_gradient_that_a_forward_takes_is_part_of_its_graph() -> None:
    class Forces(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return -torch.autograd.grad(self.energy(x).sum(), x)[0]

    model, x = Forces().eval(), torch.randn(3, 4)
    captured = CompiledForward(model.forward, backend="eager")
    for example in (x, 2 * x):
        torch.testing.assert_close(captured(example), model(example))
    assert captured.graphs == 1 and captured.misses == 0
