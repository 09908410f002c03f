"""The standard tests of this plugin, and of its kernel for linears."""

from __future__ import annotations

import pytest
import torch

import kpt_plugin_cpu.plugin
from kpt.testing import KernelSuite, PluginSuite


class TestCpu(PluginSuite):
    plugin = kpt_plugin_cpu.plugin


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
class TestOnednnLinear(KernelSuite):
    kernel = next(spec for spec in kpt_plugin_cpu.plugin.kpt_kernels() if spec.op == "linear")
