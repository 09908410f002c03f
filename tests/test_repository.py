"""The repository keeps the promises that its architecture makes."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kpt

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "kpt_core" / "kpt"

#: Lower layers first; a module may import its own layer and those before it.
LAYERS = ("specs", "judge", "ops", "kernels", "graph_kernels", "transaction", "artifact", "cli")
#: Modules beside the layers, and the highest layer that each of them may import at run time.
BESIDE = {
    "hookspecs": "specs",
    "plugins": "specs",
    "profiles": "specs",
    "user_cache": "specs",
    "interruption": "specs",
    "compiling": "specs",
    "modelfiles": "specs",
}
#: Libraries that only plugins may name.
VENDORS = set(
    "accelerate azure boto3 diffusers google kubernetes lightning mlflow onnx onnxruntime openvino peft "
    "sentence_transformers tensorrt torchao transformers triton wandb".split()
)
#: The exceptions: a model folder's layout and the classes in it are defined by this library alone, and
#: both loading one and rebuilding it from an artifact have to work before any adapter plugin is installed.
MODEL_LOADERS = {
    ("kpt_core/kpt/modelfiles/folders.py", "transformers"),
    ("kpt_core/kpt/artifact/reading.py", "transformers"),
}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names that a file imports, with lines; what is imported for annotations only is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for inner in ast.walk(node):
                inner.ignored = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if getattr(node, "ignored", False):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def part_of(path: Path) -> str:
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def test_lower_layers_never_import_upper_ones() -> None:
    rank = {name: position for position, name in enumerate(LAYERS)}
    wrong = []
    for path in sources(CORE):
        part = part_of(path)
        allowed = rank.get(part, rank.get(BESIDE.get(part, ""), None))
        if allowed is None:
            continue
        for name, line in imports(path):
            target = name.split(".")[1] if name.startswith("kpt.") else ""
            if rank.get(target, -1) > allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({part}) imports {name}")
    assert wrong == []


def test_every_part_of_the_core_has_a_place_in_the_layers() -> None:
    known = {*LAYERS, *BESIDE, "testing", "__init__"}
    assert {part_of(path) for path in sources(CORE)} <= known


def test_the_core_imports_no_plugin_no_vendor_and_no_test_suite() -> None:
    wrong = []
    for path in sources(CORE):
        for name, line in imports(path):
            first = name.split(".")[0]
            if (str(path.relative_to(ROOT)), first) in MODEL_LOADERS:
                continue
            testing = name.startswith("kpt.testing") and part_of(path) not in {"testing", "cli"}
            if first in VENDORS or first.startswith("kpt_plugin") or testing:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_no_module_and_no_public_function_share_a_name() -> None:
    """Importing ``kpt.name`` the module would hide ``kpt.name`` the function."""
    modules = {module.name for module in pkgutil.iter_modules([str(CORE)])}
    assert modules.isdisjoint(kpt.__all__)


def test_public_functions_stay_callable_after_every_submodule_was_imported() -> None:
    for module in pkgutil.walk_packages([str(CORE)], "kpt."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in kpt.__all__:
        assert name == "__version__" or callable(getattr(kpt, name)), name


@pytest.mark.parametrize(
    "module", ["kpt", "kpt.specs", "kpt.hookspecs", "kpt.plugins", "kpt.profiles", "kpt.cli.main"]
)
def test_importing_the_front_of_the_house_imports_no_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_every_module_has_a_docstring_and_postponed_annotations() -> None:
    wrong = []
    folders = [CORE, ROOT / "plugins", ROOT / "tools", ROOT / "examples", ROOT / "benchmarks"]
    for path in (path for folder in folders for path in sources(folder)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{path.relative_to(ROOT)} has no docstring")
        names = [name for name, _ in imports(path)]
        if len(tree.body) > 1 and "__future__.annotations" not in names:
            wrong.append(f"{path.relative_to(ROOT)} does not postpone annotations")
    assert wrong == []


def test_generated_documentation_has_not_drifted() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/generate_reference.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_drift_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import generate_reference

    stale = tmp_path / "page.md"
    stale.write_text("old\n", encoding="utf-8")
    monkeypatch.setattr(generate_reference, "ROOT", tmp_path)
    monkeypatch.setattr(generate_reference, "generated", lambda: {stale: "new\n"})
    monkeypatch.setattr(sys, "argv", ["generate_reference.py", "--check"])
    with pytest.raises(SystemExit, match=r"page\.md"):
        generate_reference.main()
    assert stale.read_text(encoding="utf-8") == "old\n"


def test_every_distribution_builds_a_wheel() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/check_wheels.py"), "--build-only"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("kpt_core", "kpt_plugin_cpu", "kernel_pytorch"):
        assert f"{name}-{kpt.__version__}-py3-none-any.whl" in done.stdout
