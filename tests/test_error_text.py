"""What receipts say of errors: a sentence that is of use, whoever wrote the error."""

from __future__ import annotations

import pytest

from kpt.error_text import summary

DYNAMO = """Data-dependent branching
  Explanation: Detected data-dependent branching (e.g. `if my_tensor.sum() > 0:`). Dynamo does not support it.
  Hint: This graph break is fundamental - it is unlikely that Dynamo will ever trace through your code.

  Developer debug context: attempted to jump with TensorVariable()

 For more details about this graph break, please visit: https://example.org

from user code:
   File "/home/me/model.py", line 22, in forward
    if x.sum() > 0:

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Nested tensors have no sizes. Please file an issue.\nframe #0", "Nested tensors have no sizes"),
        (
            DYNAMO,
            "Data-dependent branching: Detected data-dependent branching (e.g. `if my_tensor.sum() > 0:`) "
            "(model.py, line 22)",
        ),
        ("backend='x' raised:\nKeyError: 'a'\n\nSet TORCH_LOGS", "backend='x' raised: 'a'"),
        ("sizes 1.5 and 2 differ, e.g. B", "sizes 1.5 and 2 differ, e.g. B"),
        ("", ""),
    ],
)
def test_it_is_what_an_error_says_first(message: str, told: str) -> None:
    assert summary(ValueError(message)) == f"ValueError: {told}".removesuffix(": ")


def test_it_has_an_end_and_needs_no_message() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert len(summary(ValueError("word " * 1000))) < 320
    assert summary(Hostile()) == "Hostile: (its message cannot be shown)"
