"""These tests run kernels: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    absent = pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1")
    for item in items:
        if str(item.path).startswith(here) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)


@pytest.fixture(scope="session", autouse=True)
def language_stays_exchanged() -> Iterator[None]:
    """What Triton's interpreter puts in place of its language for each launch stays there between launches.

    Looking for every function of the language anew at each launch, and at each call of a function of Triton's
    own within one, took 31 % of these tests' time. Nothing is compiled here that needs the language as it is.
    """
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with pytest.MonkeyPatch.context() as patch:
        scope = interpreter._patch_lang(everything)
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        try:
            yield
        finally:
            scope.restore()
