"""What commands get in place of a search: inputs for the small model, and a receipt."""

from __future__ import annotations

from kpt.transaction.receipt import Entry, Receipt

INPUTS = "x=float32[4,8]"


def receipt() -> Receipt:
    kept = Entry("freeze", "compile", "cpu", "kept", "1.40x in company", 1.4)
    wrong = Entry("fast", "kernels", "cpu", "value", "wrong by 1 %", 2.0)
    return Receipt("Net", "inference", "exact", "latency", accepted=[kept], rejected=[wrong])
