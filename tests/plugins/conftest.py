"""Installed distributions made on the fly: a package, its metadata and its entry points."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Protocol

import pytest

from conformance import HOME
from kpt import plugins

PRELUDE = "import kpt\nfrom kpt.specs import *\n"
GOOD = (
    PRELUDE + "@kpt.hookimpl\ndef kpt_passes():\n    yield PassSpec('{name}.pass', 'layout', 'math:sqrt')\n"
)


class Install(Protocol):
    def __call__(
        self,
        name: str,
        source: str | None = ...,
        *,
        plugin: str = ...,
        version: str = ...,
        requires: tuple[str, ...] = ...,
        site: Path | None = ...,
        entry: str = ...,
    ) -> Path: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install distributions into a folder of the test that is on `sys.path`.

    The environment's own plugins are hidden, so that a test sees only what it installed.
    """
    before = set(sys.modules)
    mine = tmp_path / "site"
    mine.mkdir()
    monkeypatch.delenv("KPT_PLUGINS", raising=False)
    monkeypatch.delenv("KPT_DISABLE_PLUGINS", raising=False)
    monkeypatch.setattr("importlib_metadata.distributions", _only_below(tmp_path))
    monkeypatch.syspath_prepend(str(mine))
    plugins.clear_cache()

    def run(
        name: str,
        source: str | None = None,
        *,
        plugin: str = "",
        version: str = "1.0",
        requires: tuple[str, ...] = ("kpt-core>=0.1",),
        site: Path | None = None,
        entry: str = "",
    ) -> Path:
        where = site or mine
        module = name.replace("-", "_")
        plugin = plugin or name
        text = GOOD.format(name=plugin) if source is None else PRELUDE + dedent(source)
        (where / f"{module}.py").write_text(text)
        info = where / f"{module}-{version}.dist-info"
        info.mkdir()
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        metadata.extend(f"Requires-Dist: {requirement}" for requirement in requires)
        (info / "METADATA").write_text("\n".join(metadata) + "\n\n")
        (info / "entry_points.txt").write_text(f"[kpt.plugins]\n{plugin} = {entry or module}\n")
        plugins.clear_cache()
        return info

    yield run
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    plugins.clear_cache()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module that references like ``{HOME}:name`` can point to."""
    module = types.ModuleType(HOME)
    monkeypatch.setitem(sys.modules, HOME, module)
    return module


def _only_below(folder: Path):  # type: ignore[no-untyped-def]
    import importlib_metadata

    original = importlib_metadata.distributions

    def distributions(**options: object):  # type: ignore[no-untyped-def]
        for distribution in original(**options):
            if str(distribution.locate_file("")).startswith(str(folder)):
                yield distribution

    return distributions
