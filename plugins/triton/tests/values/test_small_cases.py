"""What the compute sanitizer watches (`make sanitize`) runs to its end."""

from __future__ import annotations

import pytest
import small_cases


@pytest.mark.parametrize("family", small_cases.FAMILIES)
def test_every_case_ends(family: str) -> None:
    assert small_cases.run([family]) > 0
