"""What the tests of conformance suites share: plugins made of specs, and what a suite says of them."""

from __future__ import annotations

from unittest import SkipTest

import kpt
from kpt.testing import PluginSuite, Suite
from kpt.testing.suite import standard_tests

#: A module that the fixture ``home`` makes, which references can point to.
HOME = "kpt_test_conformance"


def plugin_of(**hooks):
    """A plugin object whose hooks return the given specs."""
    members = {name: kpt.hookimpl(_returning(specs, name)) for name, specs in hooks.items()}
    return type("Plugin", (), members)()


def _returning(specs, name):
    def hook(self):
        return specs

    hook.__name__ = name
    return hook


def outcomes(suite: Suite) -> dict[str, str]:
    """What each standard test says: "" where it passes, "-" where it is skipped, or the failure."""
    said = {}
    for name, _ in standard_tests(type(suite)):
        try:
            getattr(suite, name)()
            said[name] = ""
        except SkipTest:
            said[name] = "-"
        except Exception as error:  # noqa: BLE001 - whatever a standard test raises is its failure
            said[name] = str(error)
    return said


def failures(suite: Suite) -> dict[str, str]:
    return {name: text for name, text in outcomes(suite).items() if text not in ("", "-")}


def plugin_suite(plugin: object) -> Suite:
    return type("TestIt", (PluginSuite,), {"plugin": plugin})()
