"""Rewrite constraints.txt from the distributions that this environment holds.

Every distribution of the environment is pinned, except our own and pip's. A pin of a distribution that
does not support the oldest Python we do carries a marker, so that pip stays free to choose an older
release there. Local version labels (``2.13.0+cpu``) are dropped: the constraint allows every build.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LEFT_OUT = {"pip", "setuptools", "wheel"}
HEADER = """\
# The versions that this release was tested with; written by tools/pin_constraints.py (make pin).
"""


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_ours(distribution: metadata.Distribution) -> bool:
    name = normalised(distribution.metadata["Name"])
    return name in {"kernel-pytorch", "kpt-core"} or name.startswith("kpt-plugin-")


def pin(distribution: metadata.Distribution) -> str:
    """``name==version``, with a marker where the version does not run on every Python of ours."""
    line = f"{normalised(distribution.metadata['Name'])}=={Version(distribution.version).public}"
    required = str(distribution.metadata.json.get("requires_python") or "")
    if not required:
        return line
    supported = [python for python in PYTHONS if SpecifierSet(required).contains(f"{python}.99")]
    if len(supported) == len(PYTHONS) or not supported:
        return line
    return f'{line} ; python_version >= "{supported[0]}"'


def main() -> None:
    pins = {
        pin(distribution)
        for distribution in metadata.distributions()
        if not is_ours(distribution) and normalised(distribution.metadata["Name"]) not in LEFT_OUT
    }
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(sorted(pins)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
