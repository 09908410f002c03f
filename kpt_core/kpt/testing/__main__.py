"""``python -m kpt.testing NAME``: the standard tests of an installed plugin, without pytest.

Prints one JSON object: the tests by name, each with its state and its reason. NAME is the name of an
installed plugin or of a module with hooks.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any
from unittest import SkipTest

from kpt.plugins.discovery import candidates
from kpt.plugins.isolation import attempt
from kpt.plugins.status import normalised, one_line
from kpt.testing.plugin_suite import PluginSuite
from kpt.testing.suite import standard_tests


def check(plugin: object) -> list[dict[str, str]]:
    """The result of each standard test on ``plugin``."""
    suite: Any = type("TestPlugin", (PluginSuite,), {"plugin": plugin})
    results = []
    for name, _ in standard_tests(suite):
        outcome = attempt(getattr(suite(), name))
        error = outcome.error
        state = "passed" if error is None else "skipped" if isinstance(error, SkipTest) else "failed"
        reason = (
            ""
            if error is None
            else str(error)
            if isinstance(error, (SkipTest, AssertionError))
            else one_line(error)
        )
        results.append({"test": name, "state": state, "reason": reason})
    return results


def find(name: str) -> object:
    """The installed plugin ``name``, or the module of that name. Raises whatever its import raises."""
    for candidate in candidates()[0]:
        if normalised(name) in (normalised(candidate.name), candidate.distribution):
            return candidate.entry_point.load()
    return importlib.import_module(name)


def main(arguments: list[str]) -> int:
    """Check the plugin that is named; 0 where every standard test passes or is skipped."""
    outcome = attempt(find, arguments[0])
    if outcome.error is not None:
        reason = f"it cannot be imported: {one_line(outcome.error)}"
        results = [{"test": "import", "state": "failed", "reason": reason}]
    else:
        results = check(outcome.value)
    print(json.dumps({"plugin": arguments[0], "tests": results}))
    return int(any(result["state"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
