"""Conformance suites for plugin authors: subclass one, say what it tests, and run pytest.

    from kpt.testing import PluginSuite
    import kpt_plugin_mine.hooks

    class TestMine(PluginSuite):
        plugin = kpt_plugin_mine.hooks

The core itself never imports this package.
"""

from __future__ import annotations

from kpt.testing.kernel_suite import KernelSuite
from kpt.testing.models import tiny_models
from kpt.testing.plugin_suite import PluginSuite
from kpt.testing.suite import Suite

__all__ = ["KernelSuite", "PluginSuite", "Suite", "tiny_models"]
