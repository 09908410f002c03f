"""What outputs are made of: found, compared and rebuilt, of whatever form they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from kpt.judge import outputs, tree
from kpt.judge.handover import judge_strides
from kpt.judge.outputs import equal_objects, leaves
from matmul_problem import EAGER


def test_identical_sees_every_bit_and_every_leaf() -> None:
    first = {"a": EAGER, "b": [torch.tensor(math.nan), 3]}
    assert outputs.identical(first, {"a": EAGER.clone(), "b": [torch.tensor(math.nan), 3]}) is None
    assert outputs.identical(first, {"a": EAGER.clone(), "b": [torch.tensor(math.nan), 4]}) == "b[1]"
    assert outputs.identical(first, {"a": torch.nextafter(EAGER, EAGER + 1), "b": first["b"]}) == "a"
    assert outputs.identical(first, {"a": EAGER}) == "structure"


def test_an_output_that_view_refuses_is_rejected_where_eagers_is_contiguous() -> None:
    dense, turned = torch.randn(4, 6), torch.randn(6, 4).t()
    assert judge_strides({"logits": dense}, {"logits": turned})  # the other way round harms nobody
    assert judge_strides({"logits": turned}, {"logits": turned})
    assert judge_strides(turned, dense).rule == "stride"
    found = judge_strides({"logits": turned}, {"logits": dense})
    assert found.rule == "stride" and "logits has the strides [1, 4]" in found.detail
    assert judge_strides({"maps": [dense, turned]}, {"maps": [dense, dense]}).rule == "stride"
    assert judge_strides({"cache": [(turned, dense)]}, {"cache": [(dense, dense)]})  # the model's own to read


class Holder:
    def __init__(self, inner: object) -> None:
        self.inner = [inner]


def nested(depth: int, value: object) -> object:
    return value if depth == 0 else Holder(nested(depth - 1, value))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (nested(1, torch.ones(3)), nested(1, torch.ones(3)), True),
        (nested(1, torch.ones(3)), nested(1, torch.ones(1)), False),
        (nested(1, torch.ones(0)), nested(1, torch.ones(1)), False),
        (nested(1, torch.ones(3)), nested(1, torch.ones(3, dtype=torch.float64)), False),
        (nested(9, 1), nested(9, 2), False),
        (1, True, False),
        (2, 2.0, False),
        (nested(1, 2.0), nested(1, 2.0 + 1e-9), True),
    ],
)
def test_objects_are_equal_only_if_what_they_hold_is(first: object, second: object, same: bool) -> None:
    """Neither by broadcasting, nor for being nested too deep to be looked at."""
    assert equal_objects(first, second) is same


def test_an_array_of_another_byte_order_is_left_as_it_is() -> None:
    numpy = pytest.importorskip("numpy")
    (leaf,) = leaves(numpy.ones(3, dtype=">f4"))
    assert isinstance(leaf.value, numpy.ndarray)


@dataclass(frozen=True)
class Constant:
    """Takes itself for immutable, as far as copies are concerned."""

    logits: torch.Tensor

    def __copy__(self) -> Constant:
        return self


def test_rebuilding_an_output_leaves_what_was_returned_as_it_was() -> None:
    given = Constant(EAGER)
    other = tree.rebuild(given, lambda path, leaf: leaf + 1.0)
    assert given.logits is EAGER and other is not given and type(other) is Constant
    assert torch.equal(other.logits, EAGER + 1.0)
