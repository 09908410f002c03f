"""The form of a tensor's values: what those of the examples have in common.

What makes an input legal is rarely written down: token ids stay inside a vocabulary, the first token
is always the same, a mask is ones and then zeros, positions count upwards, rows sum to one. Where
nothing is recognised, a form keeps values to resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

#: Observed values kept for resampling, and elements looked at to tell a form.
POOL = 512
SAMPLE = 1 << 16
#: Tensors named like these count or point; their order is part of their meaning.
_ORDERED_NAMES = ("position", "cache_pos", "cu_seq", "seqlen", "offset", "indptr", "grid", "index", "indices")
_LENGTH_NAMES = ("length", "lens")


@dataclass(frozen=True)
class Form:
    """How values look. ``kind`` is one of

    floats: ``normal`` ``values`` (few distinct ones) ``constant`` ``one-hot`` ``simplex``;
    integers: ``pool`` ``arange`` ``constant`` ``vectors`` (whole last axes) ``lengths`` ``keep``;
    flags: ``rate``; masks: ``ones`` ``padded`` ``causal`` ``keep``.
    ``keep`` repeats the example, for what cannot be drawn. ``sides`` are where padding was seen.
    """

    kind: str
    mean: float = 0.0
    std: float = 0.0
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()
    padding_values: tuple[Any, ...] = ()
    head: int | None = None
    tail: int | None = None
    kept: float = 1.0
    dropped: float = 0.0
    sides: tuple[str, ...] = ()
    share: float = 1.0


def observe_floats(tensors: Sequence[torch.Tensor]) -> Form:
    """The form of a floating-point or complex input."""
    real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    flat = torch.cat([_sample(t).to(torch.float64) for t in real])
    flat = flat[torch.isfinite(flat)]
    if flat.numel() == 0:
        return Form("normal", mean=0.0, std=1.0, low=-1.0, high=1.0)
    mean, std = float(flat.mean()), float(flat.std(correction=0))
    plain = Form("normal", mean=mean, std=std, low=float(flat.min()), high=float(flat.max()))
    if plain.low == plain.high:
        return replace(plain, kind="constant")
    if all(t.dim() >= 2 and t.shape[-1] > 1 for t in tensors) and plain.low >= 0.0:
        rows = torch.cat([_rows(t) for t in tensors if not t.is_complex()] or [torch.zeros(1, 1)])
        if bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(-1) == 1).all()):
            return replace(plain, kind="one-hot")
        if bool(((rows.sum(-1) - 1.0).abs() < 1e-2).all()):
            return replace(plain, kind="simplex")
    distinct = flat.unique()
    if distinct.numel() <= 16 and flat.numel() >= 8 * distinct.numel():
        return replace(plain, kind="values", values=_pool(flat))
    return plain


def observe_integers(
    name: str, tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], sole: bool
) -> Form:
    """The form of an integer input.

    ``masks`` are the [batch, sequence] flags that belong to each tensor, where there is one of its
    shape; ``sole`` says that no other input would make a call fresh.
    """
    flat = torch.cat([_sample(t).to(torch.int64) for t in tensors])
    if flat.numel() == 0:
        return Form("constant")
    plain = Form("pool", low=float(flat.min()), high=float(flat.max()))
    lower = name.lower()
    ordered = any(part in lower for part in _ORDERED_NAMES)
    if plain.low == plain.high:
        return replace(plain, kind="constant", values=(int(flat[0]),))
    # Two labels 0, 1 count upwards by accident; eight rarely do.
    counting = ordered or (not sole and all(t.shape[-1:] >= (8,) for t in tensors))
    if counting and all(_is_arange(t) for t in tensors):
        return replace(plain, kind="arange", values=(int(tensors[0].reshape(-1)[0]),))
    if ordered:
        return replace(plain, kind="keep")
    if any(part in lower for part in _LENGTH_NAMES) and tensors[0].dim() == 1:
        return replace(plain, kind="lengths", values=_pool(flat))
    if tensors[0].dim() >= 3 and tensors[0].shape[-1] <= 16 and len({t.shape[-1] for t in tensors}) == 1:
        vectors = torch.cat([t.reshape(-1, t.shape[-1]).cpu().to(torch.int64) for t in tensors])[:POOL]
        return replace(plain, kind="vectors", values=tuple(tuple(row) for row in vectors.tolist()))
    return _tokens(tensors, masks, plain)


def may_flag(name: str, form: Form, shape: Sequence[int]) -> bool:
    """Whether an integer input may hold flags or kinds: several integers, all 0 or all 1 in the examples, and
    no name of numbers that count or point."""
    numbers = any(part in name.lower() for part in (*_ORDERED_NAMES, *_LENGTH_NAMES))
    return form.kind == "constant" and form.values in ((0,), (1,)) and math.prod(shape) > 1 and not numbers


def _tokens(tensors: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], plain: Form) -> Form:
    """Values resampled by position: a first and a last token that all rows share stay where they are."""
    valid, padding, firsts, lasts = [], [], set(), set()
    rows = 0
    for tensor, mask in zip(tensors, masks, strict=True):
        values = tensor.detach().cpu().to(torch.int64)
        keep = torch.ones(values.shape, dtype=torch.bool) if mask is None else mask.cpu()
        valid.append(values[keep])
        padding.append(values[~keep])
        if values.dim() == 2 and values.shape[1] >= 3:
            for row, kept in zip(values, keep, strict=True):
                if kept.any():
                    inside = row[kept]
                    firsts.add(int(inside[0]))
                    lasts.add(int(inside[-1]))
                    rows += 1
    everything = torch.cat(valid)
    head = firsts.pop() if len(firsts) == 1 else None
    tail = lasts.pop() if len(lasts) == 1 else None
    inner = everything
    for special in {head, tail} - {None}:
        expected = rows * ((special == head) + (special == tail))
        if int((everything == special).sum()) == expected:
            inner = inner[inner != special]
    if inner.numel() == 0:
        inner = everything
    return replace(
        plain,
        values=_pool(inner),
        padding_values=tuple(torch.cat(padding).unique().tolist()[:POOL]),
        head=head,
        tail=tail,
    )


def observe_mask(name: str, tensors: Sequence[torch.Tensor]) -> Form | None:
    """The form of a mask, or None if the values are no mask's."""
    values: set[float] = set()
    for tensor in tensors:
        distinct = tensor.detach().unique()
        if distinct.numel() > 2:
            return None
        values.update(float(value) for value in distinct)
    polarity = _polarity(name, tensors, values)
    if polarity is None:
        return None
    kept, dropped = polarity
    keeps = [keep_flags(tensor, kept) for tensor in tensors]
    kinds, sides, share = set(), set(), 1.0
    for keep in keeps:
        kind, side, valid = _mask_kind(keep)
        kinds.add(kind)
        sides.update(side)
        share = min(share, valid)
    kinds.discard("ones")
    kind = kinds.pop() if len(kinds) == 1 else "keep" if kinds else "ones"
    return Form(kind, kept=kept, dropped=dropped, sides=tuple(sorted(sides)), share=share)


def keep_flags(mask: torch.Tensor, kept: float) -> torch.Tensor:
    """True where ``mask`` keeps a position."""
    return mask.detach() == (bool(kept) if mask.dtype == torch.bool else kept)


def _polarity(name: str, tensors: Sequence[torch.Tensor], values: set[float]) -> tuple[float, float] | None:
    """The values of kept and of dropped positions."""
    dtype = tensors[0].dtype
    if dtype.is_floating_point:
        floor = torch.finfo(dtype).min
        if values <= {0.0, 1.0}:
            additive = values == {0.0}
            return (0.0, floor) if additive else (1.0, 0.0)
        lowest = min(values)
        return (0.0, lowest) if max(values) == 0.0 and lowest <= -1e3 else None
    if not values <= {0.0, 1.0}:
        return None
    if values == {0.0}:  # whatever these flag, no position of the examples has it
        return (0.0, 1.0)
    first = tensors[0]
    square = first.dim() >= 2 and first.shape[-1] == first.shape[-2] and first.shape[-1] > 1
    if dtype == torch.bool and square and len(values) == 2:
        diagonal = first.diagonal(dim1=-2, dim2=-1)
        if bool((diagonal == diagonal.reshape(-1)[0]).all()):  # a query sees at least itself
            own = float(diagonal.reshape(-1)[0])
            return own, 1.0 - own
    # torch's own attention modules flag what to ignore in *_key_padding_mask.
    inverted = dtype == torch.bool and "padding_mask" in name.lower()
    return (0.0, 1.0) if inverted else (1.0, 0.0)


def _mask_kind(keep: torch.Tensor) -> tuple[str, set[str], float]:
    """Kind of one mask, the sides on which it pads, and the smallest share of a row that it keeps."""
    if bool(keep.all()):
        return "ones", set(), 1.0
    if keep.dim() < 2 or keep.shape[-1] == 1:  # flags of rows: there is no sequence to pad
        return "keep", set(), float(keep.to(torch.float32).mean())
    if keep.shape[-1] == keep.shape[-2]:
        lower = torch.ones(keep.shape[-2:], dtype=torch.bool, device=keep.device).tril()
        if bool((keep <= lower).all()) and bool(keep.diagonal(dim1=-2, dim2=-1).any()):
            padded = not bool((keep == lower).all())
            return "causal", {"right"} if padded else set(), 1.0
    steps = keep.to(torch.int8).diff(dim=-1)
    share = float(keep.to(torch.float32).mean(dim=-1).min())
    if bool((steps <= 0).all()):
        return "padded", {"right"}, share
    if bool((steps >= 0).all()):
        return "padded", {"left"}, share
    if bool(((steps <= 0).all(dim=-1) | (steps >= 0).all(dim=-1)).all()):
        return "padded", {"left", "right"}, share
    return "keep", set(), share


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > SAMPLE:  # spread over the whole tensor: the first rows may be special
        flat = flat[:: flat.numel() // SAMPLE][:SAMPLE]
    return flat.cpu()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    width = tensor.shape[-1]
    return tensor.detach().reshape(-1, width)[: max(1, SAMPLE // width)].cpu().to(torch.float64)


def _pool(flat: torch.Tensor) -> tuple[Any, ...]:
    if flat.numel() > POOL:
        flat = flat[torch.linspace(0, flat.numel() - 1, POOL).long()]
    return tuple(flat.tolist())


def _is_arange(tensor: torch.Tensor) -> bool:
    if tensor.dim() == 0 or tensor.shape[-1] < 2:
        return False
    return bool((tensor.detach().to(torch.int64).diff(dim=-1) == 1).all()) and bool(
        (tensor[..., 0] == tensor.reshape(-1)[0]).all()
    )
