"""What a pickle would import, read without running any of it."""

from __future__ import annotations

import hashlib
import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Pickles that a file of torch's old format holds in a row before the raw storages.
_LEGACY_PICKLES = 5
_ZIP_DEPTH = 3
#: Larger members hold tensors, or unpack to fill the memory; their globals stay unknown.
_SIZE_LIMIT = 2**28
_OPAQUE = "(a name that is computed while loading)"
_MARK = object()


@dataclass(frozen=True)
class PickleFacts:
    """What a file holds: its hash, the globals that its pickles name, and the files inside it.

    ``readable`` is False where a pickle in it is cut off or is none; ``globals`` then holds what
    came before. A global that a hostile pickle computes cannot be named and is listed as such.
    """

    sha256: str
    globals: tuple[str, ...]
    members: tuple[str, ...]
    readable: bool = True
    fault: str = ""


def inspect(path: str | Path) -> PickleFacts:
    """The facts about the file at ``path``; nothing in it is executed. Raises `OSError`."""
    path = Path(path)
    found: dict[str, None] = {}
    members: list[str] = []
    fault = ""
    try:
        if zipfile.is_zipfile(path):
            with path.open("rb") as file:
                for name, content in _pickles_in_zip(file, members):
                    fault = fault or _read(io.BytesIO(content), name, found, pickles=1)
        else:
            with path.open("rb") as file:
                fault = _read(file, path.name, found, pickles=_LEGACY_PICKLES)
    except zipfile.BadZipFile as error:
        fault = str(error)
    return PickleFacts(sha256(path), tuple(found), tuple(members), not fault, fault)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _pickles_in_zip(file: Any, members: list[str], depth: int = 0) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if depth == 0:
                members.append(name)
            if archive.getinfo(name).file_size > _SIZE_LIMIT:
                continue
            if name.endswith((".pkl", ".pickle")):
                yield name, archive.read(name)
            elif name.endswith((".pt", ".pth", ".bin", ".zip")) and depth < _ZIP_DEPTH:
                inner = io.BytesIO(archive.read(name))
                if zipfile.is_zipfile(inner):
                    yield from _pickles_in_zip(inner, members, depth + 1)


def _read(file: Any, name: str, found: dict[str, None], *, pickles: int) -> str:
    """Add the globals of up to ``pickles`` pickles in a row; returns what is wrong, or nothing."""
    for index in range(pickles):
        start = file.tell()
        if index and not file.read(1):
            return ""
        file.seek(start)
        try:
            for entry in _globals(file):
                found[entry] = None
        except (ValueError, EOFError, IndexError, KeyError, UnicodeDecodeError) as error:
            what = "it refers to what was never stored" if isinstance(error, KeyError) else str(error)
            return f"{name} is not a whole pickle: {what}"
    return ""


def _globals(file: Any) -> Iterator[str]:
    """The globals of one pickle, following its stack and memo as the unpickler does."""
    memo: dict[int, Any] = {}
    stack: list[Any] = []
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            module, attribute = stack[-2:]
            known = isinstance(module, str) and isinstance(attribute, str)
            yield f"{module}.{attribute}" if known else _OPAQUE
        elif name.startswith("EXT"):
            yield f"(extension code {argument})"
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[_index(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[_index(argument)])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            _take(stack, list(opcode.stack_before))
            string = "UNICODE" in name or name in ("STRING", "BINSTRING", "SHORT_BINSTRING")
            for kind in opcode.stack_after:
                stack.append(_MARK if kind is pickletools.markobject else argument if string else None)


def _take(stack: list[Any], kinds: list[Any]) -> None:
    """Remove what an opcode consumes; one that consumes a slice removes everything to the mark."""
    if pickletools.markobject in kinds:
        while stack.pop() is not _MARK:
            pass
        kinds = kinds[: kinds.index(pickletools.markobject)]
    if len(kinds) > len(stack):
        raise IndexError("it takes more from its stack than is there")
    del stack[len(stack) - len(kinds) :]


def _index(argument: Any) -> int:
    return int(argument)
