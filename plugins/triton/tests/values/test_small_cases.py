"""What the compute sanitizer watches (`make sanitize`) runs to its end."""

from __future__ import annotations

import pytest
import small_cases
from attention_cases import with_options

from kpt_plugin_triton.launch import INTERPRETED


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    """The interpreter takes its time for each program, not for its size."""
    if INTERPRETED:
        with_options(monkeypatch, BLOCK_M=128, BLOCK_N=128, SPLIT=0, DESCRIPTORS=0)


@pytest.mark.parametrize("family", small_cases.FAMILIES)
def test_every_case_ends(family: str) -> None:
    assert small_cases.run([family]) > 0
