"""What ``kpt doctor`` looks at: one function an area, each a list of findings."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import kpt
from kpt.plugins.isolation import attempt
from kpt.plugins.status import PluginError, one_line

Mark = Literal["ok", "note", "fault"]

TORCH_VERSIONS = ">=2.11,<2.14"
PROGRAMS = ("kpt", "kernelpytorch", "kpt-optimize")


@dataclass(frozen=True)
class Finding:
    """One fact: fine, worth knowing, or a fault; the latter two with a command that mends it."""

    mark: Mark
    text: str
    mend: str = ""


def examine() -> dict[str, list[Finding]]:
    """The findings by area. An area that cannot be examined is a fault itself, not a crash."""
    found: dict[str, list[Finding]] = {}
    for area, look in AREAS.items():
        outcome = attempt(lambda look=look: list(look()))
        if outcome.error is None:
            found[area] = outcome.value or []
        else:
            text = f"cannot be examined: {one_line(outcome.error)}"
            found[area] = [Finding("fault", text, "KPT_TRACEBACK=1 kpt doctor")]
    return found


def core() -> Iterable[Finding]:
    """The core's own version, and what else claims its import name."""
    import importlib_metadata

    python = platform.python_version()
    yield Finding(
        "ok", f"kpt-core {kpt.__version__} on Python {python}, {platform.system()} {platform.machine()}"
    )
    here = Path(kpt.__file__).resolve().parent
    version = attempt(importlib_metadata.version, "kpt-core").value
    if version is None:
        yield Finding("note", "kpt is imported from a folder and is not installed", "pip install kpt-core")
    elif version != kpt.__version__:
        yield Finding(
            "fault",
            f"the installed kpt-core is {version}, the imported one {kpt.__version__}",
            "pip install --force-reinstall kpt-core",
        )
    owners = attempt(importlib_metadata.packages_distributions).value or {}
    for owner in sorted({str(name) for name in owners.get("kpt", ())}):
        if owner.lower().replace("_", "-") != "kpt-core":
            yield Finding(
                "fault",
                f"the distribution {owner} is not ours and installs a package called kpt too",
                f"pip uninstall {shlex.quote(owner)} && pip install --force-reinstall kpt-core",
            )
    for folder in dict.fromkeys(sys.path):
        for other in (Path(folder or ".") / "kpt" / "__init__.py", Path(folder or ".") / "kpt.py"):
            if other.is_file() and here not in other.resolve().parents:
                yield Finding(
                    "fault",
                    f"another package called kpt is on the path: {other}",
                    f"mv {shlex.quote(str(other))} {shlex.quote(str(other))}.other",
                )


def torch() -> Iterable[Finding]:
    """PyTorch: there, of a version that is tested, and able to compile."""
    if find_spec("torch") is None:
        yield Finding("fault", "PyTorch is not installed", "pip install torch")
        return
    from packaging.specifiers import SpecifierSet

    outcome = attempt(__import__, "torch")
    if outcome.error is not None:
        yield Finding(
            "fault",
            f"PyTorch cannot be imported: {one_line(outcome.error)}",
            "pip install --force-reinstall torch",
        )
        return
    module: Any = outcome.value
    version = str(module.__version__)
    if SpecifierSet(TORCH_VERSIONS).contains(version.partition("+")[0], prereleases=True):
        yield Finding("ok", f"torch {version}, {module.get_num_threads()} threads")
    else:
        yield Finding("fault", f"torch {version} is not tested", f"pip install 'torch{TORCH_VERSIONS}'")
    from kpt.artifact.folder import missing_packages  # which imports torch

    for name in missing_packages():
        text = f"{name} is not installed; without it models are neither saved nor loaded"
        yield Finding("fault", text, f"pip install {name}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler and shutil.which(compiler):
        yield Finding("ok", f"C++ compiler {compiler}")
    else:
        what = f"CXX={compiler} is not there" if compiler else "there is no C++ compiler"
        users = "torch.compile on a CPU and norms in eager training on a GPU have none to use"
        yield Finding("note", f"{what}; {users}", "apt-get install g++")


def hardware() -> Iterable[Finding]:
    """The devices, and the probes that fail."""
    from kpt.cli.rehearsal import loaded
    from kpt.profiles import OVERRIDE_VARIABLE, detect
    from kpt.profiles import hardware as profile_of

    registry = loaded().registry
    if os.environ.get(OVERRIDE_VARIABLE):
        replaced = attempt(profile_of, measure=False, registry=registry)
        if isinstance(replaced.error, PluginError):
            yield Finding("fault", replaced.error.message, replaced.error.mend)
        else:
            text = f"{OVERRIDE_VARIABLE} replaces the real hardware"
            yield Finding("note", text, f"unset {OVERRIDE_VARIABLE}")
    present = 0
    for found in detect(registry):
        name = found.registered.spec.name
        if found.profile is not None:
            present += 1
            profile = found.profile
            gigabytes = f", {profile.memory_bytes / 2**30:.0f} GiB" if profile.memory_bytes else ""
            units = f", {profile.compute_units} compute units" if profile.compute_units else ""
            model = profile.details.get("model") or profile.name
            yield Finding("ok", f"{profile.device_type}: {model}{units}{gigabytes}")
        elif found.broken:
            mend = f"kpt plugins show {found.registered.plugin}"
            yield Finding("fault", f"{name}: {found.reason}", mend)
        else:
            yield Finding("note", f"{name}: {found.reason}")
    if not present:
        unknown = attempt(profile_of, measure=False, registry=registry).value
        name = f": {unknown.name}" if unknown is not None else ""
        yield Finding("note", f"no plugin detects hardware{name}", "kpt plugins list")


def plugins() -> Iterable[Finding]:
    """Every installed plugin with its state."""
    from kpt.cli.rehearsal import loaded

    found = loaded().statuses
    if not found:
        yield Finding(
            "note", "no plugin is installed, so that there is nothing to try", "pip install kpt-plugin-cpu"
        )
    for status in found:
        label = f"{status.name} ({status.distribution} {status.version})".replace(" )", ")")
        if status.state == "ok":
            yield Finding("ok", label)
        else:
            mark: Mark = "note" if status.state in ("disabled", "hardware-absent") else "fault"
            yield Finding(mark, f"{label} is {status.state}: {status.reason}", status.mend)


def cache() -> Iterable[Finding]:
    """The cache folder: private, or refused."""
    from kpt import user_cache

    top = user_cache.root()
    if not os.path.lexists(top):
        try:
            user_cache.check_place()
        except user_cache.CacheError as error:
            yield Finding("fault", error.message, error.mend)
        else:
            yield Finding("ok", "no cache yet")
        return
    for path in (
        (top, *sorted(entry for entry in top.iterdir() if entry.is_dir())) if top.is_dir() else (top,)
    ):
        try:
            user_cache.check(path)
        except user_cache.CacheError as error:
            yield Finding("fault", error.message, error.mend)
            continue
        if path is top:
            entries = [entry for entry in path.rglob("*") if entry.is_file()]
            size = sum(entry.stat().st_size for entry in entries) / 2**20
            yield Finding("ok", f"{_short(path)}: {len(entries)} files, {size:.1f} MiB")


def path() -> Iterable[Finding]:
    """The programs that a shell finds under our names."""
    own = {Path(sysconfig.get_path("scripts")).resolve(), Path(sys.argv[0]).resolve().parent}
    for name in PROGRAMS:
        found = [
            Path(folder, name)
            for folder in dict.fromkeys(os.environ.get("PATH", "").split(os.pathsep))
            if folder and os.access(Path(folder, name), os.X_OK) and Path(folder, name).is_file()
        ]
        if not found:
            scripts = shlex.quote(sysconfig.get_path("scripts"))
            yield Finding("note", f"{name} is not on PATH", f"export PATH={scripts}:$PATH")
            continue
        first = found[0]
        if _is_ours(first):
            elsewhere = first.resolve().parent not in own and first.parent.resolve() not in own
            if elsewhere:
                yield Finding(
                    "note",
                    f"{name} is that of another environment: {_short(first)}",
                    "type -a kpt  # then hash -r",
                )
            else:
                yield Finding("ok", f"{name}: {_short(first)}")
        else:
            yield Finding(
                "fault",
                f"{_short(first)} is not ours and hides our {name}",
                _alias()
                if name == "kpt"
                else f"mv {shlex.quote(str(first))} {shlex.quote(str(first))}.other",
            )


def _alias() -> str:
    """What makes a shell find our program although another one hides it."""
    found = shutil.which("kernelpytorch")
    if found is not None and _is_ours(Path(found)):
        return "alias kpt=kernelpytorch"
    own = Path(sysconfig.get_path("scripts"), "kernelpytorch")
    if own.is_file():
        return f"alias kpt={shlex.quote(str(own))}"
    command = shlex.join([sys.executable, "-c", "from kpt.cli.main import main; main()"])
    return f"alias kpt={shlex.quote(command)}"


def _is_ours(program: Path) -> bool:
    def start() -> bytes:
        with program.open("rb") as file:
            return file.read(4096)

    return b"kpt.cli.main" in (attempt(start).value or b"")


def _short(path: Path) -> str:
    """``path`` with the home folder as ~, so that a pasted report does not name its user."""
    home = str(Path.home())
    text = str(path)
    return "~" + text[len(home) :] if home != "/" and text.startswith(home + os.sep) else text


AREAS: dict[str, Callable[[], Iterable[Finding]]] = {
    "core": core,
    "torch": torch,
    "hardware": hardware,
    "plugins": plugins,
    "cache": cache,
    "path": path,
}
