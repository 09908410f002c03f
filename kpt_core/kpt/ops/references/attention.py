"""attention (Vaswani et al. 2017, arXiv:1706.03762)."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kpt.ops.binding import Hypothesis
from kpt.ops.captured import Seen
from kpt.ops.hypotheses import attribute, numbers_written
from kpt.specs import OpSpec

if TYPE_CHECKING:
    from kpt.ops.captured import Captured


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of ``q`` (B, H, S, D) over ``k`` (B, Hkv, L, D) and ``v`` (B, Hkv, L, Dv).

    H is a multiple of Hkv (grouped queries). ``mask`` broadcasts to (B, H, S, L): True keeps, or it
    is added. ``is_causal`` keeps keys up to the query's own index, counted from the start;
    ``window`` keeps the last ``window`` keys up to it. ``scale`` is 1/sqrt(D) by default, ``softcap``
    bounds scores to (-softcap, softcap) before the mask, and ``sinks`` (H,) are scores that take part
    in the softmax without a value. A query that sees no key gives zeros. Returns (B, H, S, Dv).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal or window is not None:
        index = torch.arange(scores.shape[-2], device=q.device)[:, None]
        other = torch.arange(scores.shape[-1], device=q.device)[None, :]
        seen = other <= index
        if window is not None:
            seen = seen & (other > index - window)
        scores = scores.masked_fill(~seen, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    blind = (wide == -math.inf).all(-1, keepdim=True)
    if sinks is not None:
        column = sinks.to(wide.dtype).view(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
        weights = F.softmax(torch.cat((wide, column), dim=-1), dim=-1)[..., :-1]
    else:
        weights = F.softmax(wide, dim=-1).masked_fill(blind, 0.0)
    return weights.to(v.dtype) @ v


class Attentions:
    """Proposes attention for a function of queries, keys and values, whatever else it takes."""

    def function_hypotheses(self, module: torch.nn.Module, captured: Captured) -> Iterator[Hypothesis]:
        tensors = captured.tensors()
        four = [n for n, t in tensors.items() if len(t.shape) == 4 and t.dtype.is_floating_point]
        if len(four) < 3:
            return
        q, k, v = four[:3]
        one, other, third = (tensors[name].shape for name in (q, k, v))
        if one[-1] != other[-1] or other[:3] != third[:3] or one[0] != other[0] or one[1] % max(other[1], 1):
            return
        shape = getattr(_first(captured.output), "shape", None)
        outputs = []
        result = "result"
        if shape == (one[0], one[2], one[1], third[-1]):
            outputs.append("result.transpose(1, 2)")
        if shape == (*one[:3], third[-1]):
            outputs.append("result")
        if type(captured.output) is tuple:
            rest = captured.output[1:]
            if any(item is not None for item in rest):
                return  # attention weights are asked for, and a fused kernel has none
            result = "({}, " + "None, " * len(rest) + ")"
        else:
            result = "{}"
        for masks, conditions in _masks(captured, (q, k, v), one[2]):
            for scale in _scales(captured):
                for softcap in _softcaps(captured):
                    for sinks in _sinks(module, one[1]):
                        arguments = {"q": q, "k": k, "v": v, **masks, **scale, **softcap, **sinks}
                        for output in outputs:
                            yield Hypothesis("attention", arguments, result.format(output), conditions)

    def unseen(self, module: torch.nn.Module, captured: Captured) -> Captured | None:
        """The calls with a mask that no example has, as a compiler may see them.

        A model leaves the mask out where a flag says as much, and builds it where it may not look at
        values or at how it is run: transformers does so whenever dynamo captures it.
        """
        masks = [name for name in captured.names if "mask" in name]
        if len(masks) != 1 or not isinstance(captured.function, types.FunctionType):
            return None
        calls = []
        for call in captured.calls:
            four = [value for value in call.values() if isinstance(value, Seen) and len(value.shape) == 4]
            if call.get(masks[0]) is not None or len(four) != 3:
                return None
            (batch, _, length, _), keys, device = four[0].shape, four[1].shape[2], four[0].device
            mask = torch.ones(length, keys, dtype=torch.bool).tril().expand(batch, 1, length, keys)
            calls.append({**call, masks[0]: Seen.of(mask.to(device))})
        return replace(captured, calls=calls)


def _first(value: object) -> object:
    return value[0] if isinstance(value, tuple) and value else value


def _masks(
    captured: Captured, used: tuple[str, ...], length: int
) -> Iterator[tuple[dict[str, str], tuple[str, ...]]]:
    """How a mask and causality reach the op; a mask that was never seen is made a condition."""
    biases = [n for n, t in captured.tensors().items() if n not in used and "bias" in n and len(t.shape) == 4]
    names = [n for n in captured.names if n not in used and "mask" in n] or [
        n for n, t in captured.tensors().items() if n not in used and len(t.shape) == 4
    ]
    mask = names[0] if names else None
    values = [call.get(mask) for call in captured.calls] if mask else []
    given = {"mask": mask} if mask and any(isinstance(v, Seen) for v in values) else {}
    conditions: tuple[str, ...] = ()
    if mask and all(v is None for v in values):
        conditions = (f"{mask} is None",)
    elif mask and all(isinstance(v, Seen) for v in values):
        conditions = (f"{mask} is not None",)
    for bias in biases:  # T5 adds positions to the scores, and puts the mask on top
        lowest = f"torch.finfo({used[1]}.dtype).min"
        if given:
            for both in (f"{bias} + {mask}", f"torch.where({mask}, {bias}, {lowest})"):
                yield {"mask": both}, conditions
        else:
            yield {"mask": bias}, conditions
            yield {"mask": bias, "is_causal": f"{used[0]}.shape[2] > 1"}, conditions
    never = bool(values) and all(isinstance(v, Seen) for v in values)
    for flag in [n for n, v in captured.calls[0].items() if "causal" in n and isinstance(v, bool)]:
        yield {**given, "is_causal": flag}, conditions
        if mask and not never and captured.function is not F.scaled_dot_product_attention:
            # what transformers computes from its flag: only a prefill without a mask is causal
            yield {**given, "is_causal": f"{flag} and {mask} is None and {used[0]}.shape[2] > 1"}, conditions
    yield given, conditions
    if not never:
        unmasked = f"{mask} is None and " if mask else ""
        yield {**given, "is_causal": f"{unmasked}{used[0]}.shape[2] > 1"}, conditions


def _scales(captured: Captured) -> list[dict[str, str]]:
    found = [
        {"scale": name}
        for name, value in captured.calls[0].items()
        if type(value) is float and "drop" not in name and "cap" not in name
    ]
    if not captured.callee:  # a region of a graph: what it multiplied or divided by
        usual = next(iter(captured.tensors().values())).shape[-1] ** -0.5  # the op's own default
        factors = [f for n in numbers_written(captured.module) if n > 0.0 for f in (n, 1.0 / n)]
        fresh = [f for f in dict.fromkeys(factors) if f != 1.0 and not math.isclose(f, usual)]
        found += [{"scale": repr(factor)} for factor in fresh]
    return [*found, {}, {"scale": "1.0"}]


def _softcaps(captured: Captured) -> list[dict[str, str]]:
    found = [{"softcap": n} for n, v in captured.calls[0].items() if type(v) is float and "cap" in n]
    if not captured.callee:
        found += [{"softcap": repr(n)} for n in numbers_written(captured.module) if n > 1.0]
    return [{}, *found]


def _sinks(module: torch.nn.Module, heads: int) -> list[dict[str, str]]:
    found = [
        {"sinks": attribute(n)} for n, p in module.named_parameters(recurse=False) if p.shape == (heads,)
    ]
    return [{}, *found]


_HOME = "kpt.ops.references.attention"
SPECS = (
    OpSpec(
        "attention",
        "(q, k, v, mask=None, is_causal=False, scale=None, softcap=None, sinks=None, window=None) -> y",
        f"{_HOME}:attention",
        f"{_HOME}:Attentions",
        "softmax attention, with grouped queries, masks, soft cap, sinks and window",
    ),
)
