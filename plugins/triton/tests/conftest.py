"""The norms' C++ library, compiled once for all tests that call it."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def norms_library() -> ModuleType:
    pytest.importorskip("triton")
    from kpt_plugin_triton.native import library

    try:
        return library.load("kpt_triton_norms")
    except library.NotCompiled as error:
        pytest.skip(str(error))
