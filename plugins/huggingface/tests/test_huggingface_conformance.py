"""The standard tests, and that asking about models imports nothing."""

from __future__ import annotations

import subprocess
import sys

import kpt_plugin_huggingface.plugin
from kpt.testing import PluginSuite


class TestHuggingFace(PluginSuite):
    plugin = kpt_plugin_huggingface.plugin


def test_asking_whether_a_model_matches_does_not_import_transformers() -> None:
    script = (
        "import sys, torch; from kpt_plugin_huggingface.adapter import HuggingFace;"
        "assert not HuggingFace().matches(torch.nn.Linear(2, 2)); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
