"""Compile the C++ of this folder into Triton's cache, once for each version of torch and Python."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch

SOURCES = Path(__file__).parent
#: Seconds that the compiler may take; 10 to 30 were seen.
PATIENCE = 300.0
_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared", "-w")


class NotCompiled(Exception):
    """There is no C++ library; the message says why, and what would help.

    ``ended``: the compiler was ended from outside, and may be started again.
    """

    def __init__(self, message: str, ended: bool = False) -> None:
        super().__init__(message)
        self.ended = ended


def compiler() -> str:
    """The C++ compiler that is called.

    Raises:
        NotCompiled: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    raise NotCompiled("no C++ compiler was found (g++ or clang++, or the one named by CXX)")


def load(name: str) -> ModuleType:
    """The extension module ``name``, from ``name`` without ``kpt_triton_`` in this folder; kept on disk.

    Raises:
        NotCompiled: the compiler, Python's headers or torch's are not there, or they failed.
    """
    from triton.runtime.cache import get_cache_manager

    source = SOURCES / f"{name.removeprefix('kpt_triton_')}.cpp"
    text = source.read_text(encoding="utf-8")
    versions = torch.__version__, torch.version.cuda, torch.version.hip, sys.version, platform.machine()
    key = hashlib.sha256("\n".join((text, *map(str, versions), *_FLAGS)).encode()).hexdigest()
    cache = get_cache_manager(key)
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = cache.get_file(file)
    if path is None:
        path = cache.put(_compiled(source), file, binary=True)
    return _imported(name, path)


def _compiled(source: Path) -> bytes:
    program = compiler()
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise NotCompiled("Python's headers are not installed (Python.h; python3-dev or python3-devel)")
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "library.so"
        command = [
            *(program, *_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
            *("-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")),
            *("-isystem", sysconfig.get_path("include"), str(source), "-o", str(built)),
            *("-L", str(torch_folder / "lib"), "-lc10", "-ltorch_cpu", "-ltorch_python"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=folder)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotCompiled(f"{program} failed: {error}") from error
        if done.returncode < 0:
            raise NotCompiled(f"{program} was ended by signal {-done.returncode}", ended=True)
        if done.returncode != 0:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise NotCompiled(f"{program} failed: {said.strip()}")
        return built.read_bytes()


def _imported(name: str, path: str) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None:
        raise NotCompiled(f"{path} is no extension module")
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise NotCompiled(f"{path} cannot be loaded: {error}") from error
    return module
