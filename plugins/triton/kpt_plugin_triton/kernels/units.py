"""What Triton can't see of a number: that it is a multiple of something smaller than 16."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def whole_units(number, UNIT: tl.constexpr):
    """``number``, a multiple of the power of two UNIT: rows that it spaces are read UNIT elements at once."""
    return number // UNIT * UNIT
