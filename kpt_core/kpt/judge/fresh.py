"""Fresh values of a form, in any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kpt.judge.forms import Form, keep_flags


def draw_floats(form: Form, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Fresh fp32 values [*shape] of a floating-point form."""
    size = tuple(shape)
    if form.kind == "one-hot":
        chosen = torch.randint(size[-1], size[:-1], generator=generator)
        return torch.nn.functional.one_hot(chosen, size[-1]).to(torch.float32)
    if form.kind == "simplex":
        return torch.softmax(torch.randn(size, generator=generator), dim=-1)
    if form.kind == "values":
        return _resample(form.values, size, generator, torch.float32)
    noise = torch.randn(size, generator=generator)
    if form.kind == "constant":
        # A constant example (ones, zeros) is a placeholder if it is large and a setting if it is small.
        if noise.numel() <= 16:
            return form.mean * (1.0 + 0.25 * torch.rand(size, generator=generator))
        return form.mean + noise * (abs(form.mean) or 1.0)
    drawn = form.mean + form.std * noise
    if form.low >= 0.0 or form.high <= 0.0:
        return drawn.clamp(form.low, form.high)
    spread = 6.0 * form.std
    return drawn.clamp(form.mean - spread, form.mean + spread)


def draw_integers(
    form: Form,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    example: torch.Tensor,
    keep: torch.Tensor | None = None,
    bound: int | None = None,
) -> torch.Tensor:
    """Fresh int64 values [*shape]; ``keep`` flags the valid positions, ``bound`` the size to fill."""
    size = tuple(shape)
    if form.kind == "constant":
        return torch.full(size, form.values[0] if form.values else 0, dtype=torch.int64)
    if form.kind == "arange":
        return (torch.arange(size[-1]) + form.values[0]).expand(size).clone()
    if form.kind == "keep":
        return stretch(example, size).to(torch.int64)
    if form.kind == "vectors":
        choices = torch.tensor(form.values, dtype=torch.int64)
        return choices[torch.randint(len(choices), size[:-1], generator=generator)]
    if form.kind == "lengths" and bound is not None:
        lengths = torch.randint(1, bound + 1, size, generator=generator)
        if lengths.numel():
            lengths.view(-1)[0] = bound
        return lengths.sort(descending=True).values  # packing asks for descending lengths by default
    drawn = _resample(form.values, size, generator, torch.int64)
    if len(size) == 2 and size[1] >= 1:
        flags = torch.ones(size, dtype=torch.bool) if keep is None else keep
        rows = torch.arange(size[0])
        weight = torch.arange(1, size[1] + 1)
        some = flags.any(dim=1)
        last = (flags * weight).argmax(dim=1)
        first = (flags * weight.flip(0)).argmax(dim=1)
        if form.head is not None:
            drawn[rows[some], first[some]] = form.head
        if form.tail is not None:
            drawn[rows[some], last[some]] = form.tail
    if keep is not None and form.padding_values:
        drawn = torch.where(keep, drawn, _resample(form.padding_values, size, generator, torch.int64))
    return drawn


def draw_mask(
    form: Form,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    example: torch.Tensor,
    lengths: torch.Tensor | None,
    side: str,
) -> torch.Tensor:
    """Flags [*shape] of kept positions; ``lengths`` [batch] are those of each row, None without padding."""
    size = tuple(shape)
    if form.kind == "keep":
        return keep_flags(stretch(example, size), form.kept)
    keep = torch.ones(size, dtype=torch.bool)
    square = len(size) >= 2 and size[-1] == size[-2]
    if form.kind == "causal" and len(size) >= 2:
        keep = torch.ones(size[-2:], dtype=torch.bool).tril(size[-1] - size[-2]).expand(size).clone()
    if lengths is not None and size and lengths.shape[0] == size[0]:
        flags = length_flags(lengths, size[-1], side)
        keep = keep & flags.reshape(size[0], *(1,) * (len(size) - 2), size[-1])
        if square and len(size) > 2:  # a padded query that sees nothing is NaN in eager mode too
            keep = keep | torch.eye(size[-1], dtype=torch.bool)
    return keep


def mixed_flags(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Flags [*shape], a quarter of them unset: one at least, never all of several, nor all of a last axis."""
    size = tuple(shape)
    flags = torch.rand(size, generator=generator) < 0.75
    fixed = torch.zeros(size, dtype=torch.bool)
    if size and size[-1] > 1:
        if len(size) >= 2 and size[-1] == size[-2]:  # a query sees itself, also in models that look back only
            fixed = torch.eye(size[-1], dtype=torch.bool).expand(size).clone()
        else:
            fixed.scatter_(-1, torch.randint(size[-1], (*size[:-1], 1), generator=generator), True)
    elif fixed.numel() > 1:
        fixed.view(-1)[int(torch.randint(fixed.numel(), (1,), generator=generator))] = True
    flags |= fixed
    if flags.numel() and bool(flags.all()):
        free = (~fixed).view(-1).nonzero().view(-1)
        flags.view(-1)[free[int(torch.randint(len(free), (1,), generator=generator))]] = False
    return flags


def ragged_lengths(batch: int, sequence: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Valid lengths [batch]: at least one shorter than ``sequence`` and, of several, one full."""
    shortest = max(1, min(sequence - 1, int(share * sequence)))
    lengths = torch.randint(shortest, sequence + 1, (batch,), generator=generator)
    if batch > 1:
        lengths[0] = sequence
    if batch and sequence > 1:
        lengths[-1] = torch.randint(shortest, sequence, (1,), generator=generator)
    return lengths[torch.randperm(batch, generator=generator)]


def length_flags(lengths: torch.Tensor, sequence: int, side: str) -> torch.Tensor:
    """Flags [batch, sequence] of ``lengths`` [batch] valid positions, padded on ``side``."""
    steps = torch.arange(sequence)
    if side == "left":
        return steps >= sequence - lengths[:, None]
    return steps < lengths[:, None]


def stretch(example: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example repeated or cut along each axis to ``shape``."""
    if example.device.type == "meta":
        raise ValueError("an input whose values cannot be drawn needs its example; build the spec from calls")
    stretched = example.detach().cpu()
    for axis, size in enumerate(shape):
        if stretched.shape[axis] != size:
            index = torch.arange(size) % max(stretched.shape[axis], 1)
            stretched = stretched.index_select(axis, index)
    return stretched


def _resample(
    values: Sequence[Any], size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    choices = torch.tensor(values, dtype=dtype)
    return choices[torch.randint(len(choices), size, generator=generator)]
