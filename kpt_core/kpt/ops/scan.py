"""Read the Python code that a site runs, for state that examples cannot show."""

from __future__ import annotations

import dis
import gc
import os
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_TRUSTED = (_TORCH, _HERE, "<frozen", "<kpt")
_IMPORTING = "<frozen importlib"
_CONTAINERS = (dict, list, set, bytearray)


class Executed:
    """Python code that ran outside torch, with what is wrong about it (empty when nothing is)."""

    def __init__(self) -> None:
        self.codes: dict[types.CodeType, str | None] = {}
        self._imports = 0

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(_IMPORTING):
            # A first call may import modules lazily (torch does); what they run is not the site's code.
            self._imports += {"call": 1, "return": -1}.get(event, 0)
        if event != "call" or self._imports:
            return
        if code in self.codes or _trusted(code.co_filename):
            return
        self.codes[code] = _writes(code) or _mutable(code, frame)

    @property
    def complaint(self) -> str | None:
        return next((text for text in self.codes.values() if text), None)

    @property
    def all_integers(self) -> tuple[int, ...]:
        """Every integer literal: a loss may leave a class out by one."""
        found = {v for code in self.codes for v in code.co_consts if type(v) is int and abs(v) < 1 << 20}
        return tuple(sorted(found))

    @property
    def integers(self) -> tuple[int, ...]:
        """Integer literals: sizes on either side of one may take different branches."""
        found: set[int] = set()
        for code in self.codes:
            found.update(v for v in code.co_consts if type(v) is int and 2 < v <= 8192)
        return tuple(sorted(found))


@lru_cache(maxsize=4096)
def _trusted(filename: str) -> bool:
    """Whether a file belongs to torch, to the proof itself or to Python's standard library."""
    if filename.startswith(_TRUSTED):
        return True
    return filename.startswith(_LIBRARY) and "-packages" + os.sep not in filename


def executed(function: Callable[[], Any]) -> tuple[Executed, Any]:
    """Run ``function`` and tell which code ran.

    The garbage collector waits meanwhile: what it calls (finalizers, callbacks of others) would be taken
    for code of ``function``.
    """
    watch = Executed()
    previous, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(watch)
    try:
        result = function()
    finally:
        sys.setprofile(previous)
        if collects:
            gc.enable()
    return watch, result


@lru_cache(maxsize=4096)
def _writes(code: types.CodeType) -> str | None:
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"{code.co_name} writes the global {instruction.argval!r}"
        if name == "STORE_DEREF" and instruction.argval in code.co_freevars:
            return f"{code.co_name} writes the closure variable {instruction.argval!r}"
        if name in ("STORE_ATTR", "DELETE_ATTR"):
            return f"{code.co_name} writes the attribute {instruction.argval!r}"
    return None


@lru_cache(maxsize=4096)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")})


def _mutable(code: types.CodeType, frame: types.FrameType) -> str | None:
    for name in code.co_freevars:
        if isinstance(frame.f_locals.get(name), _CONTAINERS):
            return f"{code.co_name} reads the mutable closure variable {name!r}"
    for name in _globals_read(code):
        if isinstance(frame.f_globals.get(name), _CONTAINERS):
            return f"{code.co_name} reads the mutable global {name!r}"
    return None
