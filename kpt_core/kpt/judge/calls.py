"""One call of a model: its positional and keyword arguments, and how examples become calls."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from kpt.judge import tree

#: Examples read from an iterable when nothing else is said.
EXAMPLES = 8
_ACCEPTED = (
    "a tensor, a tuple of positional arguments, a dict of keyword arguments, "
    "or an iterable of these (a list, a generator, a DataLoader)"
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call. The containers are not copied; `clone` gives an independent call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def on(self, function: Callable[..., Any]) -> Any:
        """Call ``function`` with these arguments."""
        return function(*self.args, **self.kwargs)

    def leaves(self) -> list[tuple[tree.Path, Any]]:
        """Every leaf with its path: the first part is an argument's position or its keyword."""
        return [*tree.walk(self.args), *tree.walk(self.kwargs)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, for instance ``[0]``, ``input_ids``, ``past.layers[0].keys``."""
        return {tree.spell(path): leaf for path, leaf in self.leaves() if isinstance(leaf, torch.Tensor)}

    def map(self, change: Callable[[tree.Path, Any], Any]) -> Call:
        """The same call with every leaf replaced by ``change(path, leaf)``."""
        return Call(tree.rebuild(self.args, change), tree.rebuild(self.kwargs, change))

    def map_each(self, change: Callable[[Any], Any]) -> Call:
        """The same call with every leaf replaced by ``change(leaf)``, made once of each.

        What is one object in several places, as in ``model(x, x)``, stays one.
        """
        made: dict[int, Any] = {}

        def once(path: tree.Path, leaf: Any) -> Any:
            if id(leaf) not in made:
                made[id(leaf)] = change(leaf)
            return made[id(leaf)]

        return self.map(once)

    def map_tensors(self, change: Callable[[torch.Tensor], Any]) -> Call:
        """The same call with every tensor replaced by ``change(tensor)``, made once of each."""
        return self.map_each(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf)

    def clone(self) -> Call:
        """An independent copy with the same values, strides, storage alignment and shared tensors."""
        return self.map_each(
            lambda leaf: clone_tensor(leaf) if isinstance(leaf, torch.Tensor) else copied_leaf(leaf)
        )

    def to(self, device: torch.device | str) -> Call:
        """The same call with its tensors on ``device``."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def fingerprint(self) -> str:
        """A hash of the structure, the metadata and every value: equal calls have equal fingerprints."""
        digest = hashlib.sha256()
        for path, leaf in self.leaves():
            digest.update(repr(path).encode())
            if isinstance(leaf, torch.Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)} {leaf.device}".encode())
                digest.update(raw_bytes(leaf))
            else:
                digest.update(f"{type(leaf).__qualname__} {leaf!r}".encode() if tree.is_atom(leaf) else b"?")
        return digest.hexdigest()


def copied_leaf(leaf: Any) -> Any:
    """A copy of a leaf that is no tensor; constants and what cannot be copied are shared."""
    if tree.is_atom(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except (TypeError, copy.Error, RuntimeError):
        return leaf  # a lock or a handle


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's elements as bytes in row-major order, NaN payloads included."""
    detached = tensor.detach()
    if detached.layout is not torch.strided:
        detached = detached.to_dense()
    if detached.is_quantized:
        detached = detached.int_repr()
    flat = detached.resolve_conj().resolve_neg().contiguous().cpu()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of storage from a tensor's first element to its last, both included (0 if it is empty)."""
    if any(size == 0 for size in sizes):
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def clone_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same values, strides and alignment, also of expanded and sliced tensors.

    Subclasses and sparse tensors are cloned by their own means.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if (
        not plain
        or tensor.is_quantized
        or tensor.device.type == "meta"
        or tensor.is_conj()
        or tensor.is_neg()
    ):
        duplicate = tensor.detach().clone()
    else:
        source = tensor.detach()
        extent = span(source.shape, source.stride())
        pad = source.storage_offset() % 16  # keeps a misaligned tensor misaligned
        buffer = torch.zeros(pad + extent, dtype=source.dtype, device=source.device)
        if extent:
            flat = source.as_strided((extent,), (1,), source.storage_offset())
            buffer[pad:].copy_(flat)
        duplicate = buffer.as_strided(source.shape, source.stride(), pad)
    return duplicate.requires_grad_(tensor.requires_grad) if tensor.requires_grad else duplicate


def as_calls(example_inputs: Any, limit: int = EXAMPLES) -> list[Call]:
    """Turn what a user passes as ``example_inputs`` into at most ``limit`` calls.

    A tensor or a tuple is one call by position, a mapping one call by keyword, any other iterable
    yields one call an element (an element may also be a list of positional arguments, as a
    DataLoader's default collation gives). An iterator is read no further than ``limit``.

    Raises:
        TypeError: something else was passed, or an element is something else.
        ValueError: there is no example, or one holds no tensor.
    """
    single = _as_call(example_inputs, "example_inputs", element=False)
    if single is not None:
        return [single]
    if isinstance(example_inputs, tuple):  # only a tuple of `Call`s gets here
        return list(example_inputs[:limit])
    if not _is_iterable_of_examples(example_inputs):
        raise TypeError(f"example_inputs is {_described(example_inputs)}; expected {_ACCEPTED}")
    calls = []
    for index, element in enumerate(itertools.islice(example_inputs, limit)):
        call = _as_call(element, f"example_inputs[{index}]", element=True)
        if call is None:
            raise TypeError(
                f"example_inputs[{index}] is {_described(element)}; expected each element to be a tensor, "
                "a tuple of positional arguments or a dict of keyword arguments"
            )
        calls.append(call)
    if not calls:
        raise ValueError(
            f"example_inputs is an empty {type(example_inputs).__name__}; pass at least one example "
            "(an iterator that was read before is empty too)"
        )
    return calls


def _is_iterable_of_examples(value: Any) -> bool:
    if isinstance(value, (str, bytes, type, torch.nn.Module)) or _is_numpy(value):
        return False
    return isinstance(value, Iterable)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "numpy"


def _as_call(value: Any, where: str, *, element: bool) -> Call | None:
    if isinstance(value, Call):
        call = value
    elif isinstance(value, (torch.Tensor, PackedSequence)):  # the latter is a tuple, and one argument
        call = Call((value,))
    elif isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(
                f"{where} is a dict whose key {wrong[0]!r} is no string; its keys name keyword arguments"
            )
        call = Call((), dict(value))
    elif isinstance(value, tuple):
        if value and all(isinstance(item, Call) for item in value):
            return None
        call = Call(tuple(value))
    elif isinstance(value, list) and element and not tree.is_atom(value):
        if not tree.holds_tensors(value):
            return None
        call = Call(tuple(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and tree.holds_tensors(value):
        call = Call((value,))
    else:
        return None
    if not any(isinstance(leaf, torch.Tensor) for _, leaf in call.leaves()):
        raise ValueError(f"{where} holds no tensor ({_described(value)}); expected {_ACCEPTED}")
    return call


def _described(value: Any) -> str:
    if _is_numpy(value):
        return f"a numpy {type(value).__name__}; convert it with torch.from_numpy"
    text = repr(value) if isinstance(value, (int, float, str, bytes, type(None), list, dict, tuple)) else ""
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{type(value).__name__} {text}".strip()


def check_devices(calls: Sequence[Call], model: torch.nn.Module) -> None:
    """Raise a ValueError that names both devices if an input lives elsewhere than ``model``.

    A model without tensors, or one spread over several devices, decides for itself; scalars on the
    host are legal everywhere.
    """
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(devices) != 1:
        return
    (home,) = devices
    for index, call in enumerate(calls):
        for name, tensor in call.tensors().items():
            if tensor.device == home or (tensor.dim() == 0 and tensor.device.type == "cpu"):
                continue
            raise ValueError(
                f"input {name!r} of example {index} is on {tensor.device} but the model is on {home}; "
                f"move one of them, for instance with .to({str(home)!r})"
            )
