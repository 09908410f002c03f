"""Build the wheels of every distribution and try them in a clean environment.

Wheels are built from the source distributions, as a release would be. The new environment sees the torch
of the one that runs this script (through a ``.pth`` file), and the libraries that plugins are for, so that
nothing large is downloaded twice; what the core needs is installed from the configured index. What is
checked there: each import name comes from the wheel and not from the source tree, the programs start, and
every plugin is found and works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Every folder of plugins/ that is a distribution, by the name of its plugin.
PLUGINS = {path.parent.name: path.parent for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))}
DISTRIBUTIONS = [ROOT / "kpt_core", *PLUGINS.values(), ROOT]
PROGRAMS = ("kpt", "kernelpytorch", "kpt-optimize")


def run(command: list[str | Path], **options: object) -> str:
    """Standard output of ``command``; its standard error is shown, and a failure ends the script."""
    shown = " ".join(str(part) for part in command)
    print(f"$ {shown}", file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"exit {done.returncode}: {shown}\n{done.stdout}")
    return str(done.stdout)


def build(folder: Path) -> list[Path]:
    """One wheel for each distribution, written to ``folder``, by the build tools of this environment."""
    for source in DISTRIBUTIONS:
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source])
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != len(DISTRIBUTIONS):
        raise SystemExit(f"expected {len(DISTRIBUTIONS)} wheels, found {[wheel.name for wheel in wheels]}")
    return wheels


def install(wheels: list[Path], folder: Path) -> Path:
    """A clean environment in ``folder`` with ``wheels`` installed; the path of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    pip: list[str | Path] = [programs / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    plugins = [wheel for wheel in wheels if wheel.name.startswith("kpt_plugin_")]
    run([*pip, "-c", ROOT / "constraints.txt", *(wheel for wheel in wheels if wheel not in plugins)])
    run([*pip, "--no-deps", *plugins])
    return programs


def lend_torch(programs: Path) -> None:
    """Let the clean environment import torch and its dependencies from this one, after its own packages."""
    import torch

    here = Path(torch.__file__).resolve().parent.parent
    there = run(
        [programs / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    ).strip()
    Path(there, "zz_torch_of_the_builder.pth").write_text(f"{here}\n", encoding="utf-8")


def check(programs: Path, folder: Path) -> None:
    """Fail unless the installed distributions work, with a working directory outside the source tree."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    modules = ["kpt", *(f"kpt_plugin_{name.replace('-', '_')}" for name in PLUGINS)]
    places = "; ".join(f"import {name}; print({name}.__file__)" for name in modules)
    for path in run([programs / "python", "-c", places], cwd=folder, env=environment).split():
        if not Path(path).is_relative_to(folder):
            raise SystemExit(f"imported {path}, expected a file of the wheel inside {folder}")
    for program in PROGRAMS:
        if not run([programs / program, "--help"], cwd=folder, env=environment).strip():
            raise SystemExit(f"{program} --help printed nothing")
    listed = json.loads(run([programs / "kpt", "plugins", "list", "--json"], cwd=folder, env=environment))
    states = {entry["name"]: entry["state"] for entry in listed["plugins"] if entry["distribution"]}
    for name in PLUGINS:
        if states.get(name) not in ("ok", "hardware-absent"):
            raise SystemExit(f"the installed plugin {name} is not in use: {listed}")
    print(run([programs / "python", "-c", SMOKE], cwd=folder, env=environment).strip())


SMOKE = """
import torch, kpt
torch.manual_seed(0)
layers = [layer for _ in range(40) for layer in (torch.nn.Linear(16, 16), torch.nn.ReLU())]
model, x = torch.nn.Sequential(*layers).eval(), torch.randn(4, 16)
with torch.no_grad():
    expected = model(x)
    assert kpt.optimize(model, x, level="exact", plugins=["cpu"], budget=60.0, cache=False) is model
    receipt = kpt.report(model)
    assert receipt.searched and receipt.optimized and receipt.speedup_low > 1.0, receipt.to_json()
    said = receipt.headline()
    torch.testing.assert_close(model(x), expected)
    assert kpt.report(model).calls["optimized"] == 1
    assert kpt.restore(model) is model and "forward" not in vars(model)
    assert torch.equal(model(x), expected)
print("wheels: installed, imported;", said, "and restored, with torch", torch.__version__)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-only", action="store_true", help="build the wheels and list their names")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kpt-wheels-") as name:
        folder = Path(name).resolve()
        wheels = build(folder / "dist")
        print("\n".join(wheel.name for wheel in wheels))
        if not arguments.build_only:
            programs = install(wheels, folder / "venv")
            lend_torch(programs)
            check(programs, folder)


if __name__ == "__main__":
    main()
