"""What a call has to share with those of a proof: the plain values that nothing reads, but all agreed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kpt.ops.binding import Anything, Hypothesis
from kpt.ops.captured import Captured, Seen

_PRIMITIVES = (bool, int, float, str, type(None), torch.dtype)


def constants(captured: Captured, hypothesis: Hypothesis) -> dict[str, Any]:
    """What a call has to share with those of the proof, by parameter name.

    The plain values that ``hypothesis`` does not read, where all calls agreed; `Anything` for an
    optional tensor that was always given; for ``**kwargs``, the keywords with their values.
    """
    texts = (
        *hypothesis.values.values(),
        *hypothesis.arguments.values(),
        *hypothesis.conditions,
        hypothesis.output,
    )
    read = {name for text in texts for name in compile(text, "<hypothesis>", "eval").co_names}
    calls = captured.calls
    found: dict[str, Any] = {}
    for name, parameter in captured.signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL or name not in calls[0]:
            continue
        values = [call.get(name) for call in calls]
        if parameter.kind is parameter.VAR_KEYWORD:
            found[name] = _keywords(values)
        elif all(isinstance(value, Seen) for value in values):
            if parameter.default is None:
                found[name] = Anything
        elif name not in read and all(_plain_and_equal(value, values[0]) for value in values):
            found[name] = values[0]
    return found


def _plain_and_equal(value: Any, other: Any) -> bool:
    return isinstance(value, _PRIMITIVES) and type(value) is type(other) and value == other


def _keywords(calls: Sequence[Any]) -> dict[str, Any]:
    """Keywords that were passed on, with the value if it was plain and always the same."""
    found: dict[str, Any] = {}
    for call in calls:
        for key, value in (call or {}).items():
            same = isinstance(value, _PRIMITIVES) and found.get(key, value) == value
            found[key] = value if same else Anything
    return found
