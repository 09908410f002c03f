"""Examples become calls; calls are copied with their memory layout."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kpt.judge.calls import Call, as_calls, check_devices


class Cache:
    """A library's cache: an object that holds tensors."""

    def __init__(self) -> None:
        self.layers = [torch.ones(2, 3)]
        self.length = 3


def test_each_accepted_form_becomes_calls() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert as_calls(x)[0].args == (x,)
    assert as_calls((x, y))[0].args == (x, y)
    assert as_calls({"a": x})[0].kwargs == {"a": x}
    assert as_calls(UserDict(a=x))[0].kwargs == {"a": x}
    assert as_calls(Call((x,)))[0].args == (x,)
    assert [call.args for call in as_calls([x, y])] == [(x,), (y,)]
    assert [call.kwargs for call in as_calls([{"a": x}, {"a": y}])] == [{"a": x}, {"a": y}]
    assert [call.args for call in as_calls((Call((x,)), Call((y,))))] == [(x,), (y,)]
    assert as_calls((x, 3, None))[0].args == (x, 3, None)


def test_a_named_tuple_is_one_call() -> None:
    batch = namedtuple("Batch", "image label")(torch.ones(1), torch.zeros(1))
    assert len(as_calls(batch)) == 1
    assert as_calls(batch)[0].args == (batch.image, batch.label)


def test_a_packed_sequence_is_one_argument() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert as_calls(packed)[0].args == (packed,) and len(as_calls([packed, packed])) == 2


def test_a_data_loader_yields_positional_arguments() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0), torch.arange(6)), batch_size=2)
    calls = as_calls(loader)
    assert len(calls) == 3
    assert torch.equal(calls[1].args[1], torch.tensor([2, 3]))


def test_an_iterator_is_read_no_further_than_the_limit() -> None:
    read = []

    def examples() -> Iterator[torch.Tensor]:
        for number in range(100):
            read.append(number)
            yield torch.full((1,), float(number))

    assert len(as_calls(examples(), limit=3)) == 3
    assert read == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (3, TypeError, "int 3; expected a tensor"),
        (None, TypeError, "NoneType"),
        ("text", TypeError, "str 'text'"),
        (torch.nn.Linear(1, 1), TypeError, "Linear"),
        ([1, 2], TypeError, r"example_inputs\[0\] is int 1"),
        ([torch.ones(1), "b"], TypeError, r"example_inputs\[1\] is str"),
        ([[1, 2]], TypeError, r"example_inputs\[0\] is list"),
        ([], ValueError, "empty list"),
        (iter(()), ValueError, "read before"),
        ((), ValueError, "holds no tensor"),
        ({}, ValueError, "holds no tensor"),
        ((1, "a"), ValueError, "holds no tensor"),
        ({"a": 1}, ValueError, "holds no tensor"),
        ({0: torch.ones(1)}, TypeError, "key 0 is no string"),
    ],
)
def test_anything_else_is_refused_with_what_was_passed(wrong: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        as_calls(wrong)


def test_an_array_is_refused_with_the_conversion() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"torch\.from_numpy"):
        as_calls(numpy.ones(3))


def test_a_clone_keeps_strides_alignment_sharing_and_gradients() -> None:
    base = torch.randn(5, 8)
    call = Call(
        (base[1:, ::2], base.t(), torch.randn(4, 1).expand(4, 6), base.flatten()[1:9]),
        {"x": base, "again": base, "g": torch.randn(2, requires_grad=True), "empty": torch.empty(0, 3)},
    )
    copy = call.clone()
    for name, tensor in call.tensors().items():
        other = copy.tensors()[name]
        assert torch.equal(tensor, other)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
        assert tensor.storage_offset() % 16 == other.storage_offset()
        assert tensor.requires_grad == other.requires_grad
        assert not tensor.numel() or tensor.data_ptr() != other.data_ptr()
    assert copy.kwargs["x"] is copy.kwargs["again"]


def test_each_tensor_is_replaced_once_and_nothing_else_is() -> None:
    x, lock = torch.ones(2), object()
    call = Call((x, [x, lock]), {"x": x, "y": torch.zeros(2)})
    seen: list[torch.Tensor] = []
    moved = call.map_tensors(lambda tensor: seen.append(tensor) or tensor + 1)
    assert len(seen) == 2 and torch.equal(moved.args[0], x + 1)
    assert moved.args[0] is moved.args[1][0] is moved.kwargs["x"] is not x
    assert moved.args[1][1] is lock and call.args[0] is x
    on_meta = call.to("meta")
    assert on_meta.kwargs["x"] is on_meta.args[0] and on_meta.args[0].device.type == "meta"


def test_nested_containers_and_foreign_objects_are_walked_and_copied() -> None:
    @dataclass
    class Batch:
        ids: torch.Tensor
        meta: dict[str, Any]

    cache = Cache()
    call = Call((Batch(torch.ones(2), {"m": torch.zeros(1), "n": "name"}),), {"past": cache})
    assert set(call.tensors()) == {"[0].ids", "[0].meta.m", "past.layers[0]"}
    copy = call.clone()
    copy.kwargs["past"].layers[0].add_(1)
    copy.args[0].meta["m"].add_(1)
    assert torch.equal(cache.layers[0], torch.ones(2, 3))
    assert torch.equal(call.args[0].meta["m"], torch.zeros(1))
    assert type(copy.args[0]) is Batch and copy.kwargs["past"].length == 3


def test_a_fingerprint_depends_on_every_value_and_on_structure() -> None:
    x = torch.tensor([1.0, float("nan")])
    same = Call((x.clone(),)).fingerprint()
    assert Call((x,)).fingerprint() == same
    assert Call((x.double(),)).fingerprint() != same
    assert Call((), {"a": x}).fingerprint() != same
    assert Call((x, 1)).fingerprint() != Call((x, 2)).fingerprint()
    changed = x.clone()
    changed[0] = 2.0
    assert Call((changed,)).fingerprint() != same
    assert (
        Call((torch.arange(6.0).view(2, 3).t(),)).fingerprint()
        == Call((torch.arange(6.0).view(2, 3).t().contiguous(),)).fingerprint()
    )


def test_inputs_elsewhere_than_the_model_name_both_devices() -> None:
    model = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"'x' of example 1 is on cpu but the model is on meta"):
        check_devices([Call((), {"x": torch.ones(2, device="meta")}), Call((), {"x": torch.ones(2)})], model)
    check_devices([Call((torch.ones(2, device="meta"), torch.tensor(1.0)))], model)
    check_devices([Call((torch.ones(2),))], torch.nn.Identity())
