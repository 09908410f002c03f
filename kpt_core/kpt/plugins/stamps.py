"""When a plugin's code changed although its version did not.

A recipe that was found with yesterday's code must not be reused, nor a rejection kept, while an author
edits an editable install or an object in a notebook. A stamp changes with the source files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpt.plugins.isolation import attempt

#: Files of a package that are looked at; a larger one is no plugin that somebody edits by hand.
_FILES = 2000


def is_editable(distribution: Any) -> bool:
    """Whether a distribution (of importlib-metadata) is installed from a folder that is being edited."""
    text = attempt(distribution.read_text, "direct_url.json").value
    facts = attempt(json.loads, text).value if text else None
    return isinstance(facts, dict) and bool((facts.get("dir_info") or {}).get("editable"))


def stamp(specs: Iterable[Any]) -> str:
    """A hash of the specs and of the files of the packages that they name, by size and time."""
    from kpt.plugins.validation import is_reference

    found = sorted(specs, key=repr)
    packages = {
        value.partition(":")[0].partition(".")[0]
        for spec in found
        for name in (entry.name for entry in fields(spec))
        if is_reference(name) and isinstance(value := getattr(spec, name), str)
    }
    digest = hashlib.sha256(repr(found).encode())
    for package in sorted(packages):
        for path in sorted(_files(package))[:_FILES]:
            facts = attempt(path.stat).value
            if facts is not None:
                digest.update(f"{path} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _files(package: str) -> Iterator[Path]:
    """The Python files of a top-level package, which is not imported for that."""
    spec = attempt(find_spec, package).value
    if spec is None:  # __main__, or a module that was put together by hand
        origin = getattr(sys.modules.get(package), "__file__", None)
        if origin:
            yield Path(origin)
        return
    for location in spec.submodule_search_locations or ():
        yield from Path(location).rglob("*.py")
    if spec.origin and spec.has_location:
        yield Path(spec.origin)
