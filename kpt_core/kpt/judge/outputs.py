"""What a call returned: named leaves, where its padding lies, and distances measured in fp64.

Distances are accumulated over chunks of bounded size, so that comparing two large outputs needs no
fp64 copy of either.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from kpt.judge import tree

#: Elements converted to fp64 at a time (32 MiB per operand).
CHUNK = 1 << 22
#: True is equal to 1, and 1 to 1.0.
_NUMBERS = (bool, int, float, complex)
_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


@dataclass(frozen=True)
class Leaf:
    """One part of an output: its name, for instance ``logits`` or ``past.layers[0].keys``.

    ``kind`` is the class of what was returned, where ``value`` is a tensor made of it.
    """

    name: str
    value: Any
    kind: type

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


def leaves(output: Any) -> list[Leaf]:
    """The named leaves of ``output`` in a stable order; NumPy's arrays and numbers as tensors."""
    return [Leaf(tree.spell(path), _as_tensor(leaf), type(leaf)) for path, leaf in tree.walk(output)]


def _as_tensor(leaf: Any) -> Any:
    """A tensor with a copy of what an array of numbers holds; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None or tree.is_atom(leaf) or not isinstance(leaf, (numpy.ndarray, numpy.generic)):
        return leaf
    try:
        return torch.from_numpy(numpy.array(leaf))
    except (TypeError, ValueError):  # text, objects, dates; another byte order
        return leaf


def computed_later(leaf: Any) -> bool:
    """Whether what a leaf holds is computed after the call: a generator, a coroutine, a future."""
    return isinstance(leaf, (Iterator, AsyncIterator, Awaitable, Future))


def equal_objects(first: Any, second: Any, depth: int = 12) -> bool:
    """Whether two leaves that are no tensors are the same to whoever gets them.

    Numbers of one class are compared up to rounding, objects by their own ``==`` or else by what they hold.
    What has neither, or is nested deeper than ``depth``, is not equal.
    """
    if isinstance(first, _NUMBERS) and isinstance(second, _NUMBERS) and type(first) is not type(second):
        return False
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-5) or (math.isnan(first) and math.isnan(second))
    if first is second:
        return True
    if depth == 0:
        return False
    if type(first) in (list, tuple) and type(first) is type(second):
        pairs = list(zip(first, second))
        return len(first) == len(second) and all(equal_objects(*pair, depth - 1) for pair in pairs)
    if type(first) is dict and type(second) is dict:
        return first.keys() == second.keys() and all(
            equal_objects(value, second[key], depth - 1) for key, value in first.items()
        )
    if tree.is_atom(first) or type(first) is not type(second) or type(first).__eq__ is not object.__eq__:
        try:
            shapes = [(getattr(v, "shape", None), getattr(v, "dtype", None)) for v in (first, second)]
            if shapes[0] != shapes[1]:  # `==` would broadcast
                return False
            same = first == second
            return bool(same.all() if hasattr(same, "all") else same)
        except (RuntimeError, TypeError, ValueError):
            return False
    if not hasattr(first, "__dict__"):
        return False
    return equal_objects(vars(first), vars(second), depth - 1)


def tensors(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of ``output`` by name."""
    return {leaf.name: leaf.value for leaf in leaves(output) if leaf.is_tensor}


def is_logits(name: str) -> bool:
    """Whether a leaf is named as unnormalised scores over its last axis."""
    return "logits" in name.rsplit(".", 1)[-1].lower()


def valid_axis(tensor: torch.Tensor, mask: torch.Tensor) -> int | None:
    """The axis of ``tensor`` that runs along the sequence of ``mask`` [batch, sequence], if any.

    Outputs are [batch, sequence, ...]; attention weights and cached keys are [batch, heads,
    sequence, ...].
    """
    batch, sequence = mask.shape
    if tensor.dim() < 2 or tensor.shape[0] != batch:
        return None
    order = (2, 1) if tensor.dim() == 4 else (1,)
    return next((axis for axis in order if tensor.shape[axis] == sequence), None)


def mask_for(name: str, tensor: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The mask that says which positions of the output ``name`` count.

    Of an encoder's and a decoder's mask, outputs named ``encoder...`` follow the first, all others
    the second, as far as their shapes allow.
    """
    fitting = {key: mask for key, mask in masks.items() if valid_axis(tensor, mask) is not None}
    decoder = not name.startswith("encoder")
    order = sorted(fitting, key=lambda key: key.startswith("decoder") != decoder)
    return fitting[order[0]] if order else None


def select_valid(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The positions of ``tensor`` that ``mask`` [batch, sequence] keeps; all of it if it has no such axes."""
    if mask is None:
        return tensor
    axis = valid_axis(tensor, mask)
    if axis is None:
        return tensor
    return tensor.movedim(axis, 1)[mask.to(device=tensor.device, dtype=torch.bool)]


@dataclass(frozen=True)
class Distance:
    """How far ``values`` are from a reference, over the elements where both are finite.

    ``error`` and ``scale`` are root mean squares of the difference and of the reference; ``misfits``
    counts elements that are not finite although the reference's are, ``mismatches`` elements where
    the reference is not finite and the value is something else.
    """

    error: float
    scale: float
    cosine: float
    norm_ratio: float
    misfits: int
    mismatches: int
    elements: int

    @property
    def relative(self) -> float:
        """``error / scale``; 0 for equal values, infinite where the reference is all zero."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.scale if self.scale else math.inf


def _wide(chunk: torch.Tensor) -> torch.Tensor:
    """``chunk`` in fp64 (complex128), on the host if its device has no fp64."""
    wide = torch.complex128 if chunk.is_complex() else torch.float64
    try:
        return chunk.to(wide)
    except (RuntimeError, TypeError):
        return chunk.cpu().to(wide)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` in one dimension, without history; sparse and quantised ones as plain."""
    detached = tensor.detach()
    if detached.is_quantized:
        detached = detached.dequantize()
    if detached.layout is not torch.strided:
        detached = detached.to_dense()
    return detached.resolve_conj().resolve_neg().reshape(-1)


def _stored(operands: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The values of sparse operands, side by side, wherever one of them has any.

    There would be no memory for most of them as dense matrices.
    """
    plain = [operand.detach().to_sparse_coo().coalesce() for operand in operands]
    zeros = [
        torch.sparse_coo_tensor(
            each.indices(), torch.zeros_like(each.values()), each.shape, check_invariants=False
        )
        for each in plain
    ]
    found = []
    for each in plain:
        for other in zeros:
            each = each + other.to(each.dtype)
        found.append(each.coalesce().values().reshape(-1))
    return found


def _chunks(*operands: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equal pieces of flattened operands in fp64, on one device; complex numbers become pairs."""
    sparse = all(operand.layout in _SPARSE for operand in operands)
    plain = _stored(operands) if sparse else [flat(operand) for operand in operands]
    for start in range(0, plain[0].numel(), CHUNK):
        pieces = [_wide(operand[start : start + CHUNK]) for operand in plain]
        if len({piece.device for piece in pieces}) > 1:
            pieces = [piece.cpu() for piece in pieces]
        if any(piece.is_complex() for piece in pieces):
            pieces = [torch.view_as_real(piece.to(torch.complex128)) for piece in pieces]
        yield tuple(pieces)


def _finite_sums(
    value: torch.Tensor, expected: torch.Tensor, *own: torch.Tensor
) -> tuple[float, float, float, float] | None:
    """Sums of squares of the difference, of ``expected`` and of ``value``, and of their products.

    None where an element is not finite, which shows in the sums without a pass over memory for each question.
    """
    value, expected = value.reshape(-1), expected.reshape(-1)
    difference = value - expected
    pairs = ((difference, difference), (expected, expected), (value, value), (value, expected))
    sums = [torch.dot(left, right) for left, right in pairs]
    sums += [torch.dot(each.reshape(-1), each.reshape(-1)) for each in own]
    numbers: list[float] = torch.stack(sums).tolist()
    if not all(map(math.isfinite, numbers)):
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def distance(values: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor | None = None) -> Distance:
    """Measure ``values`` against ``reference`` (same shape, any dtypes).

    With ``eager`` given, elements where the eager result is not finite count for nothing: it
    overflowed in its own dtype, and a candidate may do so too.
    """
    squares = reference_squares = value_squares = dot = 0.0
    counted = misfits = mismatches = 0
    operands = (values, reference) if eager is None else (values, reference, eager)
    for value, expected, *own in _chunks(*operands):
        sums = _finite_sums(value, expected, *own)
        if sums is not None:
            squares, reference_squares = squares + sums[0], reference_squares + sums[1]
            value_squares, dot = value_squares + sums[2], dot + sums[3]
            counted += value.numel()
            continue
        finite, expected_finite = torch.isfinite(value), torch.isfinite(expected)
        judged = torch.isfinite(own[0]) if own else torch.ones_like(finite)
        misfits += int((~finite & expected_finite & judged).sum())
        same = (value == expected) | (torch.isnan(value) & torch.isnan(expected))
        strange = ~expected_finite & ~same
        if own:  # where eager itself is finite, or differs from the reference, it is no misfit to follow it
            strange &= ~judged & ~((value == own[0]) | (torch.isnan(value) & torch.isnan(own[0])))
        mismatches += int(strange.sum())
        both = finite & expected_finite & judged
        value, expected = torch.where(both, value, 0.0), torch.where(both, expected, 0.0)
        squares += float((value - expected).square().sum())
        reference_squares += float(expected.square().sum())
        value_squares += float(value.square().sum())
        dot += float((value * expected).sum())
        counted += int(both.sum())
    number = max(counted, 1)
    norms = math.sqrt(value_squares) * math.sqrt(reference_squares)
    cosine = dot / norms if norms else float(value_squares == reference_squares)
    ratio = math.sqrt(value_squares / reference_squares) if reference_squares else float(value_squares == 0.0)
    return Distance(
        error=math.sqrt(squares / number),
        scale=math.sqrt(reference_squares / number),
        cosine=max(-1.0, min(1.0, cosine)),
        norm_ratio=ratio,
        misfits=misfits,
        mismatches=mismatches,
        elements=counted,
    )


def rms(tensor: torch.Tensor) -> float:
    """Root mean square of the finite elements."""
    return distance(tensor, tensor).scale


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square error relative to the reference's root mean square."""
    return distance(values, reference).relative


def cosine(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Cosine similarity of the flattened tensors; 1 if both are all zero."""
    return distance(values, reference).cosine


def rounding_error(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """Root mean square error of ``reference`` rounded to ``dtype``: what no result in ``dtype`` can beat."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return 0.0
    squares, counted = 0.0, 0
    for (piece,) in _chunks(reference):
        rounded = piece.to(dtype).to(torch.float64)
        finite = torch.isfinite(rounded) & torch.isfinite(piece)
        squares += float(torch.where(finite, rounded - piece, 0.0).square().sum())
        counted += int(finite.sum())
    return math.sqrt(squares / max(counted, 1))


def _row_chunks(*operands: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Pieces of whole rows along the last axis, in fp64 on one device."""
    width = operands[0].shape[-1]
    rows = [operand.detach().reshape(-1, width) for operand in operands]
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows[0].shape[0], step):
        pieces = [_wide(row[start : start + step]) for row in rows]
        if len({piece.device for piece in pieces}) > 1:
            pieces = [piece.cpu() for piece in pieces]
        yield tuple(pieces)


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(logits)) in nats, along the last axis."""
    total, rows = 0.0, 0
    for values, expected in _row_chunks(logits, reference):
        log_p = torch.log_softmax(expected, dim=-1)
        log_q = torch.log_softmax(values, dim=-1)
        # A class that the reference rules out (-inf) contributes nothing.
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        total += float(terms.sum())
        rows += values.shape[0]
    return max(total / max(rows, 1), 0.0)


def top1_agreement(logits: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor) -> float:
    """Share of rows with the reference's best class, among rows that eager itself decides.

    A row is undecided where the reference's margin between its best two classes is not larger than
    twice eager's largest error in that row. With no decided row the agreement is 1.
    """
    agreed, decided = 0, 0
    if reference.shape[-1] < 2:
        return 1.0
    for values, expected, own in _row_chunks(logits, reference, eager):
        best = expected.topk(2, dim=-1)
        margin = best.values[:, 0] - best.values[:, 1]
        error = torch.nan_to_num(own - expected, nan=0.0, posinf=0.0, neginf=0.0).abs().amax(dim=-1)
        certain = margin > 2.0 * error
        agreed += int((certain & (values.argmax(dim=-1) == best.indices[:, 0])).sum())
        decided += int(certain.sum())
    return agreed / decided if decided else 1.0


def identical(first: Any, second: Any) -> str | None:
    """None if both outputs are equal bit for bit, else the name of the first leaf that differs."""
    if tree.structure(first) != tree.structure(second):
        return "structure"
    for mine, yours in zip(leaves(first), leaves(second), strict=True):
        if mine.is_tensor:
            if not bitwise_equal(mine.value, yours.value):
                return mine.name
        elif tree.is_atom(mine.value) and mine.value != yours.value and mine.value == mine.value:
            return mine.name
    return None


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitwise_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN equals a NaN of the same payload, 0 is not -0)."""
    if first.dtype != second.dtype or first.shape != second.shape or first.layout != second.layout:
        return False
    if first.device.type == "meta":
        return True
    if first.layout is not torch.strided:
        mine, yours = components(first), components(second)
        return len(mine) == len(yours) and all(map(bitwise_equal, mine, yours))
    if first.is_quantized:
        return torch.equal(first, second)
    return torch.equal(bits(first), bits(second.to(first.device)))


_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def components(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The strided tensors that hold what ``tensor`` holds: of a sparse one its indices and values.

    Dense, a sparse tensor may fill the memory.
    """
    detached = tensor.detach()
    if detached.layout is torch.strided:
        return (detached,)
    if detached.layout is torch.sparse_coo:
        return detached._indices(), detached._values()
    if detached.layout in _ROWS:
        return detached.crow_indices(), detached.col_indices(), detached.values()
    if detached.layout in _COLUMNS:
        return detached.ccol_indices(), detached.row_indices(), detached.values()
    return (detached.to_dense(),)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers (a view where possible, of the same shape or one axis more)."""
    detached = tensor.detach().resolve_conj().resolve_neg()
    if detached.is_complex():
        detached = torch.view_as_real(detached)
    width = _BITS.get(detached.element_size())
    return detached if width is None or detached.dtype == width else detached.view(width)
