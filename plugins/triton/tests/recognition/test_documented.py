"""docs/kernels.md says which ops are found in models and which are called directly; it has to be so."""

from __future__ import annotations

import re
from pathlib import Path

from triton_ops import REGISTRY

import kpt_plugin_triton.plugin as plugin
from kpt.ops import catalogue

PAGE = Path(__file__).parents[4] / "docs" / "kernels.md"


def listed(text: str) -> set[str]:
    """The ops in the first columns of a section's tables."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    return {op for row in rows for op in re.findall(r"`(\w+)`", row)}


def test_the_page_lists_what_is_found_and_what_is_for_direct_use() -> None:
    section = PAGE.read_text().partition("## The kernels")[2].partition("\n## ")[0]
    found, direct = section.split("These are for direct use.")
    ops = {spec.op for spec in plugin.kpt_kernels()}
    recognised = {op for op in ops if catalogue(REGISTRY)[op].recogniser}
    assert listed(found) == recognised
    assert listed(direct) == ops - recognised
