"""The ledger of what launches compiled to: what is known is read, what may have changed is compiled."""

from __future__ import annotations

import importlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import aot_ledger
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted cannot be compiled", allow_module_level=True)

from kpt_plugin_triton import aot, norm_rows
from kpt_plugin_triton.launch import Launch, recording


def _used(launch: Launch, target: str = "sm_90") -> aot.Resources:
    ((_, _, found),) = aot_ledger.compiled([("a norm", launch)], target)
    return found.used


def _norm(columns: int = 256, warps: int = 1, dtype: torch.dtype = torch.bfloat16) -> Launch:
    with recording("sm_90") as record:
        x = torch.empty(64, columns, dtype=dtype, device="meta")
        norm_rows.run_forward(x, None, x[0], None, 1e-6, 0.0, True, True, {"ROWS": 1, "num_warps": warps})
    return record.launches[0]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The entry of `_norm` in a ledger that holds nothing else, none of which is compiled all the same."""
    key = aot_ledger.key_of(_norm(), "sm_90")
    entry = ["norm_forward", 8, 24, 0, {}, [], []]
    monkeypatch.setattr(aot_ledger, "_entries", lambda target: {key: entry} if target == "sm_90" else {})
    monkeypatch.setattr(aot_ledger, "_verified", lambda key: False)
    monkeypatch.delenv(aot_ledger.VARIABLE, raising=False)
    return entry


def test_what_is_known_is_not_compiled_again(entry: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(aot, "compile_for", compiling)
    assert _used(_norm()) == aot.Resources("norm_forward", "sm_90", 8, 24, 0, {})
    entry[3] = 12
    assert _used(_norm()).spilled == 12
    for other in (_norm(512), _norm(warps=2), _norm(dtype=torch.float16)):
        with pytest.raises(AssertionError, match="^compiled$"):
            _used(other)
    with pytest.raises(AssertionError, match="^compiled$"):
        _used(_norm(), "sm_80")


_SOURCE = """
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FACTOR = tl.constexpr(2.0)


@triton.jit
def called(value):
    return value + 1.0


@triton.jit
def kernel(x, rows, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + place, called(tl.load(x + place)) * FACTOR, mask=place < rows)


@gluon.jit
def called_by_gluon(value):
    return value + 1.0


@gluon.jit
def gluon_kernel(x, rows, BLOCK: gl.constexpr):
    gl.store(x, called_by_gluon(gl.load(x)) * BLOCK)
"""


@pytest.mark.parametrize(
    ("before", "after", "concerned"),
    [
        ("value + 1.0", "value + 3.0", {"kernel", "gluon_kernel"}),
        (".jit\ndef kernel", '.jit(do_not_specialize=["rows"])\ndef kernel', {"kernel"}),
        (".jit\ndef gluon_kernel", '.jit(do_not_specialize=["rows"])\ndef gluon_kernel', {"gluon_kernel"}),
        ("constexpr(2.0)", "constexpr(5.0)", {"kernel"}),
        ("* FACTOR", "/ FACTOR", {"kernel"}),
        ("* BLOCK)", "/ BLOCK)", {"gluon_kernel"}),
    ],
)
def test_whatever_may_change_the_code_changes_the_key(
    before: str, after: str, concerned: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(text: str) -> dict[str, str]:
        module = f"kernels_{zlib.crc32(text.encode())}"
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        found = importlib.import_module(module)
        launched = (torch.empty(4), 100), (64,), 4, 3
        return {
            name: aot_ledger.key_of(Launch(getattr(found, name), *launched), "sm_90")
            for name in ("kernel", "gluon_kernel")
        }

    monkeypatch.syspath_prepend(str(tmp_path))
    assert before in _SOURCE
    first, other, same = keys(_SOURCE), keys(_SOURCE.replace(before, after)), keys(_SOURCE + "\n")
    assert first == same
    assert {name for name in first if first[name] != other[name]} == concerned


def test_another_triton_another_launch_and_other_readers_change_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch = _norm()
    keys = {aot_ledger.key_of(launch, target) for target in ("sm_90", "sm_80")}
    keys |= {aot_ledger.key_of(other, "sm_90") for other in (_norm(512), _norm(warps=2))}
    with monkeypatch.context() as changed:
        changed.setattr(aot_ledger.triton, "__version__", "9.9.9")
        keys.add(aot_ledger.key_of(launch, "sm_90"))
    with monkeypatch.context() as changed:
        changed.setattr(aot_ledger, "_own_code", lambda: "of another aot.py")
        keys.add(aot_ledger.key_of(launch, "sm_90"))
    assert len(keys) == 6


def test_a_ledger_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot_ledger, "FOLDER", tmp_path)
    monkeypatch.setattr(aot_ledger, "_kept", {"sm_90": {"new": ["k", 0, 1, 0, {}, [], []]}})
    monkeypatch.setattr(aot_ledger, "_entries", lambda target: {"old": ["k", 0, 2, 0, {}, [], []]})
    aot_ledger._write()
    assert sorted(json.loads((tmp_path / "sm_90.json").read_text(encoding="utf-8"))) == ["new", "old"]
    monkeypatch.setenv(aot_ledger.VARIABLE, "yes")
    with pytest.raises(ValueError, match="'yes'; supported: write"):
        aot_ledger.writing()


def test_an_entry_that_is_wrong_is_noticed(entry: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is known one in sixteen is compiled."""
    monkeypatch.setattr(aot_ledger, "_verified", lambda key: True)
    with pytest.raises(AssertionError, match=r"its entry says .*make ledger"):
        _used(_norm())
    used = aot.compile_launch(_norm(), "sm_90")
    entry[:4] = used.name, used.shared, used.registers, used.spilled
    assert _used(_norm()) == used


def test_one_of_sixteen_entries_is_verified() -> None:
    keys = [f"{number * 7919:020x}" for number in range(1600)]
    assert sum(map(aot_ledger._verified, keys)) == 100
