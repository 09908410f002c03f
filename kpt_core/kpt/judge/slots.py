"""What objects keep in slots (``__slots__``), beside or in place of a dictionary."""

from __future__ import annotations

import functools
import types
from typing import Any


@functools.lru_cache(maxsize=4096)
def slot_names(cls: type) -> tuple[str, ...]:
    """The slots that the classes written in Python among ``cls`` and its bases declare.

    By the names of the descriptors: that of a private slot (``__weight``) is not the declared one.
    """
    declared = (vars(base) for base in cls.__mro__ if "__slots__" in vars(base))
    return tuple(
        name
        for members in declared
        for name, member in members.items()
        if isinstance(member, types.MemberDescriptorType)
    )


def slots_of(value: Any) -> dict[str, Any]:
    """The slots of ``value`` that are set, by name."""
    names = slot_names(value.__class__)
    return {name: getattr(value, name) for name in names if hasattr(value, name)} if names else {}
