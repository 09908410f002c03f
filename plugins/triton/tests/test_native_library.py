"""How the C++ library is compiled and left out, and what it is told of a launch."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kpt_plugin_triton.launch import Bound
from kpt_plugin_triton.native import library
from kpt_plugin_triton.native import norms as native


def test_parameters_leave_out_what_compiled_code_holds() -> None:
    signature = ["*bf16", "constexpr", "i32", "constexpr", "fp32"]
    arguments = [("x", torch.bfloat16), None, 48, 1, 0.5]
    slot = native._SLOTS.index("x")
    assert native._parameters(signature, arguments) == [(slot, "", None), (-1, "i32", 48), (-1, "fp32", 0.5)]


class Code:
    """Stands for a compiled kernel."""

    def __init__(self, scratch: int = 0, clusters: int = 1) -> None:
        target = type("Target", (), {"warp_size": 64})
        self.run = type("Run", (), {"global_scratch_size": scratch, "profile_scratch_size": 0})
        values = {"num_warps": 4, "shared": 96, "num_ctas": clusters, "launch_cooperative_grid": False}
        self.metadata = type("Metadata", (), values | {"target": target})
        self.src = type("Source", (), {"signature": {"x": "*fp32", "rows": "i32", "BLOCK": "constexpr"}})
        self.function = 11

    def warmup(self, *given: Any, **options: Any) -> Code:
        self.given, self.options = given, options
        return self


def test_a_launch_is_described_by_its_compiled_code() -> None:
    code = Code()
    kernel: Any = type("Kernel", (), {"function": code})
    bound = Bound(kernel, (5, 1, 1), (32,), 4, 2)
    described = native._launch(bound, ("x", torch.float32), 7)
    assert described == (11, (5, 1, 1), 256, 96, [(0, "", None), (-1, "i32", 7)])
    assert code.given == (torch.float32, 7, 32)
    assert code.options == {"grid": (5, 1, 1), "num_warps": 4, "num_stages": 2}
    for other in (Code(scratch=1), Code(clusters=2)):
        kernel.function = other
        assert native._launch(bound, ("x", torch.float32), 7) is None


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not trained yet."""
    for name, value in {
        "norm": None,
        "_library": None,
        "_thread": None,
        "_state": "not needed so far",
    }.items():
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "INTERPRETED", False)
    monkeypatch.setattr(native, "version", lambda: "3.6.0")


def test_the_library_is_compiled_in_the_background_once(
    anew: None, monkeypatch: pytest.MonkeyPatch, norms_library: ModuleType
) -> None:
    go, loads = threading.Event(), []

    def load(name: str) -> ModuleType:
        loads.append(name)
        assert go.wait(30)
        return norms_library

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(native, "_driver", lambda: (0, 0, 0))
    native.begin()
    native.begin()
    assert native.state() == "being compiled" and native.norm is None
    go.set()
    assert native.wait() == "in use" and native.norm is norms_library.norm and loads == ["kpt_triton_norms"]


def test_without_a_compiler_python_goes_on_and_the_state_says_why(
    anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr("triton.runtime.cache.FileCacheManager.get_file", lambda *given: None)
    with caplog.at_level("INFO", logger="kpt"):
        assert native.wait().startswith("no C++ compiler was found")
    assert native.norm is None and "norms are launched from Python: no C++ compiler" in caplog.text


def test_it_is_left_out_where_asked_and_where_triton_launches_otherwise(
    anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda name: pytest.fail("nothing is to be compiled"))
    monkeypatch.setattr(native, "version", lambda: "4.0.1")
    assert native.wait() == "Triton is 4.0.1, and the library knows how 3.6.x launches"
    monkeypatch.setattr(native, "_thread", None)
    monkeypatch.setenv(native.VARIABLE, "0")
    assert native.wait() == "KPT_TRITON_NATIVE is 0"


def test_a_compiler_that_was_ended_is_started_again(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of a search's time."""

    def ended(name: str) -> ModuleType:
        raise library.NotCompiled("g++ was ended by signal 15", ended=True)

    monkeypatch.setattr(native, "load", ended)
    assert native.wait() == "g++ was ended by signal 15"
    assert native._thread is None


@pytest.mark.parametrize(
    ("script", "said", "ended"),
    [
        ("echo 'norms.cpp:1: error: no such header' >&2; exit 1", "no such header", False),
        ("kill -TERM $$", "ended by signal 15", True),
    ],
)
def test_what_the_compiler_says_is_passed_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, script: str, said: str, ended: bool
) -> None:
    program = tmp_path / "cxx"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(library.NotCompiled, match=said) as raised:
        library._compiled(library.SOURCES / "norms.cpp")
    assert raised.value.ended is ended
