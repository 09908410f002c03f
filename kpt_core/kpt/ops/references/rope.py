"""rope: rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import TYPE_CHECKING

import torch

from kpt.ops.binding import Hypothesis
from kpt.specs import OpSpec

if TYPE_CHECKING:
    import torch.nn

    from kpt.ops.captured import Captured, Seen


def _rotated(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    one, other = x.chunk(2, dim=-1)
    return torch.cat((-other, one), dim=-1)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate ``q`` (B, H, S, D) and ``k`` (B, Hkv, S, D) by ``cos`` and ``sin`` (B or 1, S, R), R <= D.

    Pairs are (i, i + R/2), or (2i, 2i + 1) if ``interleaved``; features past R stay as they are.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        part = x[..., :width]
        out = (part * cos + _rotated(part, interleaved) * sin).to(x.dtype)
        return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)

    return turn(q), turn(k)


class Ropes:
    """Proposes rope for a function of two tensors to rotate and two tables of one shape."""

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors = {n: t for n, t in captured.tensors().items() if t.dtype.is_floating_point}
        output = captured.output
        if len(tensors) != 4 or type(output) is not tuple or len(output) != 2:
            return
        names = list(tensors)
        for q, k, one, other in _roles(names, tensors):
            if (getattr(output[0], "shape", None), getattr(output[1], "shape", None)) != (
                tensors[q].shape,
                tensors[k].shape,
            ):
                continue
            for cos, sin in permutations((one, other)):
                yield from _layouts(q, k, cos, sin, tensors)


def _roles(names: list[str], tensors: dict[str, Seen]) -> Iterator[tuple[str, str, str, str]]:
    for q, k in ((0, 1), (2, 3)):
        tables = [name for i, name in enumerate(names) if i not in (q, k)]
        one, other = (tensors[name].shape for name in tables)
        rotated = tensors[names[q]].shape, tensors[names[k]].shape
        if one == other and len(rotated[0]) == len(rotated[1]) and rotated[0][-1] == rotated[1][-1]:
            if len(rotated[0]) in (3, 4) and 2 <= len(one) <= 4 and one[-1] <= rotated[0][-1]:
                yield names[q], names[k], tables[0], tables[1]


def _layouts(q: str, k: str, cos: str, sin: str, tensors: dict[str, Seen]) -> Iterator[Hypothesis]:
    shape, table = tensors[q].shape, tensors[cos].shape
    head, width = shape[-1], table[-1]
    ways: list[tuple[str, str]] = []  # how q becomes (B, H, S, D), and back
    if len(shape) == 4:
        ways = [("{}", "{}"), ("{}.transpose(1, 2)", "{}.transpose(1, 2)")]
    elif len(table) == 2:
        ways = [
            ("{}.transpose(0, 1).unsqueeze(0)", "{}.squeeze(0).transpose(0, 1)"),
            ("{}.unsqueeze(0)", "{}.squeeze(0)"),
        ]
    flat = {2: ["{}.unsqueeze(0)"], 3: ["{}"], 4: ["{}[:, 0]", "{}[:, :, 0]"]}[len(table)]
    widths = [("{}", False), ("{}", True)]
    if 2 * width == head:
        widths += [("torch.cat(({0}, {0}), dim=-1)", False), ("{}.repeat_interleave(2, dim=-1)", True)]
    half = f"{{0}}[..., :{cos}.shape[-1] // 2]"
    widths.append((f"{half}.repeat_interleave(2, dim=-1)", True))
    paired = "{}.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)"
    for (there, back), spread in ((way, s) for way in ways for s in flat):
        for widen, interleaved in widths:
            arguments = {
                "q": there.format(q),
                "k": there.format(k),
                "cos": widen.format(spread.format(cos)),
                "sin": widen.format(spread.format(sin)),
                "interleaved": str(interleaved),
            }
            output = f"({back.format('result[0]')}, {back.format('result[1]')})"
            yield Hypothesis("rope", arguments, output)
            if not interleaved and widen == "{}":  # pairs brought side by side first, and left so
                moved = {name: paired.format(arguments[name]) for name in ("q", "k")}
                yield Hypothesis("rope", {**arguments, **moved}, output)


_HOME = "kpt.ops.references.rope"
SPECS = (
    OpSpec(
        "rope",
        "(q, k, cos, sin, interleaved=False) -> (q, k)",
        f"{_HOME}:rope",
        f"{_HOME}:Ropes",
        "rotary position embedding of queries and keys",
    ),
)
