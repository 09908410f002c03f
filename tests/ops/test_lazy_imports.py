"""What a site imports on its first call is not taken for the site's own code."""

from __future__ import annotations

import sys

from kpt.ops.scan import executed


def test_code_that_an_import_runs_is_not_the_sites(tmp_path, monkeypatch):
    (tmp_path / "kpt_test_lazily_imported.py").write_text(
        "class Thing:\n    def __init__(self):\n        self.written = 1\nthing = Thing()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def importing():
        import kpt_test_lazily_imported  # type: ignore[import-not-found]

        return kpt_test_lazily_imported.thing.written

    watch, result = executed(importing)
    assert result == 1 and watch.complaint is None
    module = sys.modules.pop("kpt_test_lazily_imported")

    def writing():
        import json  # noqa: F401 - an import before the write must not hide it

        return module.Thing()

    assert "writes the attribute 'written'" in executed(writing)[0].complaint
