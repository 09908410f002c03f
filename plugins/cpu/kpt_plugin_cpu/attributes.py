"""The attributes of an object, also where a compiler traces that cannot list them."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from typing import Any

import torch

#: Dynamo of torch 2.11 looks a name up in the ``__dict__`` of an object, and cannot say which names it has.
_LISTED = torch.__version__ >= (2, 12)


def attributes(value: Any) -> Any:
    """The attributes of ``value`` by name: its ``__dict__``, a copy of it, or an empty dictionary.

    Raises `TypeError` while torch 2.11 traces, for a class that computes the names of its attributes.
    """
    held = getattr(value, "__dict__", {})
    if _LISTED or not torch.compiler.is_dynamo_compiling():
        return held
    return {name: held.get(name) for name in _stored(type(value)) if name in held}


def _stored(cls: type) -> tuple[str, ...]:
    """The names that the methods of ``cls`` and of its bases store under, and the fields of a dataclass."""
    names = dict.fromkeys(getattr(cls, "__dataclass_fields__", ()))
    for code in _codes(cls):
        if not {"setattr", "__setattr__", "__dict__", "__setstate__"}.isdisjoint(code.co_names):
            raise TypeError(
                f"{cls.__name__}.{code.co_name} sets attributes by names that it computes, which torch "
                f"{torch.__version__} cannot list in a traced forward; use torch 2.12 or newer, or return "
                "tensors, tuples or dictionaries"
            )
        names.update((i.argval, None) for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
    return tuple(names)


def _codes(cls: type) -> Iterator[types.CodeType]:
    for base in cls.__mro__:
        for member in vars(base).values():
            if isinstance(member, property):
                functions = [member.fget, member.fset]
            else:
                functions = [getattr(member, "__func__", member)]
            codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
            yield from (code for code in codes if code.co_filename != "<string>")  # dataclasses': the fields


# Dynamo calls it and takes its answer for a constant, as of what `torch.compiler.assume_constant_result`
# decorates; that would import dynamo here.
_stored._dynamo_marked_constant = True  # type: ignore[attr-defined]
