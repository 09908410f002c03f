"""What tests of several files share: the norms' C++ library, compiled once, and the report of the ledger."""

from __future__ import annotations

import sys
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much was compiled ahead of time: many launches that are not known ask for a new ledger."""
    ledger = sys.modules.get("aot_ledger")
    if ledger is not None and sum(ledger.counted.values()):
        known, compiled = ledger.counted["known"], ledger.counted["compiled"]
        terminalreporter.write_line(
            f"ahead of time: {known} launches known, {compiled} compiled (make ledger)"
        )
