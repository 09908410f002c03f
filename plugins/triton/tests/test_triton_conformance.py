"""The standard tests of this plugin: those of its kernels are in ``values``."""

from __future__ import annotations

import kpt_plugin_triton.plugin
from kpt.testing import PluginSuite


class TestTriton(PluginSuite):
    plugin = kpt_plugin_triton.plugin
