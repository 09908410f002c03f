"""What a call of a model changes beside its tensors: attributes, the contents of containers, globals."""

from __future__ import annotations

import collections
import copy
from typing import TYPE_CHECKING, Any

import torch

from kpt.judge.bitwise import bitwise_equal
from kpt.judge.modelstate import attributes_of, shared_objects
from kpt.transaction.hooks import computed
from kpt.transaction.reading import constants_read
from kpt.transaction.suitability import Unsuitable

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.transaction.execution import Runner

_SLOTS = frozenset(vars(torch.nn.Module()))


def moving_state(runner: Runner, plain: torch.nn.Module, call: Call) -> frozenset[tuple[int, str]]:
    """Refuse a forward that assigns attributes: it would advance the copy's state and not the user's.

    Objects that modules hold are shared with copies, and so are globals and classes; what a call changes of
    them is returned, by the id of the owner and the attribute's name.
    """
    shared = [(value, attributes_of(value)) for value in shared_objects(plain)]
    around = constants_read(plain.modules())
    constants = {(owner, name): copy.copy(space[name]) for owner, space, names in around for name in names}
    before = {name: attributes_of(module) for name, module in plain.named_modules()}
    contents = {
        (name, key): value.copy()
        for name, state in before.items()
        for key, value in state.items()
        if key not in _SLOTS and isinstance(value, (list, dict, set, collections.deque))
    }
    tensors = {name: dict(module._buffers) for name, module in plain.named_modules()}
    with runner.buffers_kept():
        runner.step(plain.forward, call.clone())
    for name, module in plain.named_modules():
        changed = [
            key
            for key, value in attributes_of(module).items()
            if key not in computed(module)
            if key not in before[name]
            or (before[name][key] is not value and not _equal(before[name][key], value))
            or ((name, key) in contents and not _same_items(contents[name, key], value))
        ]
        changed += [key for key, value in module._buffers.items() if tensors[name].get(key) is not value]
        if changed:
            raise Unsuitable(
                f"the forward of {name or 'the model'} assigns {', '.join(sorted(changed))} on every call; "
                "such state cannot be shared with an optimised copy (write buffers in place instead)"
            )
    moving = {
        (id(value), key)
        for value, held in shared
        for key, now in attributes_of(value).items()
        if key not in held or (held[key] is not now and not _equal(held[key], now))
    }
    moving |= {
        (owner, name)
        for owner, space, names in around
        for name in names
        if not _equal(space.get(name), constants[owner, name])
    }
    return frozenset(moving)


def _same_items(before: Any, now: Any) -> bool:
    """Whether a container holds what it held, by identity or equality of its items."""
    if type(before) is not type(now) or len(before) != len(now):
        return False
    if isinstance(before, set):
        return bool(before == now)
    if isinstance(before, dict):
        return all(k in now and (now[k] is v or _equal(now[k], v)) for k, v in before.items())
    return all(a is b or _equal(a, b) for a, b in zip(before, now))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return (
            isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and bitwise_equal(left, right)
        )
    try:
        return bool(left == right)
    except Exception:  # noqa: BLE001 - an object without a usable comparison counts as changed
        return False
