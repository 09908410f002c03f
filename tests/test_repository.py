"""The repository keeps the promises that its architecture makes."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
    "error_text": "specs",
    "globalstate": "specs",
    "user_cache": "specs",
    "interruption": "specs",
    "compiling": "specs",
    "modelfiles": "specs",
}
#: Parts of the core that plugins build on.
OFFERED = frozenset({"specs", "judge", "ops", "compiling", "testing"})
#: Libraries that only plugins may import, by the name that they are imported by.
VENDORS = set(
    "accelerate azure bitsandbytes boto3 botocore coremltools cupy datasets deepspeed diffusers "
    "flash_attn google huggingface_hub jax keras kubernetes lightning mlflow modelopt nvidia onnx "
    "onnxruntime onnxscript openvino peft prometheus_client pynvml pytorch_lightning sagemaker "
    "sentence_transformers tensorflow tensorrt timm tokenizers torch_tensorrt torchao torchvision "
    "transformers triton vllm wandb xformers".split()
)


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


def every_import(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names that a file imports in any way that can be read off: for annotations too, and by
    `importlib.import_module` or `__import__` with the name written out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


def vendors_in(path: Path) -> list[str]:
    return [
        f"{path.name}:{line} imports {name}"
        for name, line in every_import(path)
        if name.split(".")[0] in VENDORS or name.startswith("kpt_plugin")
    ]


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


def circle(root: Path, paths: list[Path]) -> list[str]:
    """Modules below ``root`` that import each other in a circle, for annotations or inside functions too."""
    modules = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name].update(target if target in modules else node.module for target in inner)
        graph[name] &= modules.keys() - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Left out: the front, which names everything."""
    paths = [path for path in sources(CORE) if part_of(path) != "__init__"]
    assert circle(CORE.parent, paths) == []
    for plugin in (ROOT / "plugins").iterdir():
        assert circle(plugin, sources(plugin)) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    lines = {
        "first": "from kpt import second",
        "second": "if TYPE_CHECKING:\n    from kpt.third import name",
        "third": "def f():\n    import kpt.first",
        "fourth": "from kpt.first import name",
    }
    for name, text in lines.items():
        (tmp_path / "kpt").mkdir(exist_ok=True)
        (tmp_path / "kpt" / f"{name}.py").write_text(text, encoding="utf-8")
    assert set(circle(tmp_path, sources(tmp_path))) == {"kpt.first", "kpt.second", "kpt.third"}
    (tmp_path / "kpt" / "third.py").unlink()
    assert circle(tmp_path, sources(tmp_path)) == []


def test_every_part_of_the_core_has_a_place_in_the_layers() -> None:
    known = {*LAYERS, *BESIDE, "testing", "__init__"}
    assert {part_of(path) for path in sources(CORE)} <= known


def test_the_core_imports_no_plugin_and_no_vendors_library() -> None:
    wrong = [
        f"{path.relative_to(ROOT).parent}/{found}" for path in sources(CORE) for found in vendors_in(path)
    ]
    assert wrong == []


def test_every_way_of_importing_a_vendors_library_is_found(tmp_path: Path) -> None:
    lines = [
        "import transformers.models as models",
        "from transformers import BertModel",
        "importlib.import_module('transformers')",
        "__import__('boto3')",
        "import kpt_plugin_cpu",
        "if TYPE_CHECKING:\n    from triton import language",
        "def f():\n    import onnxruntime",
    ]
    for line in lines:
        (tmp_path / "module.py").write_text(line, encoding="utf-8")
        assert vendors_in(tmp_path / "module.py"), line
    for line in ("import torch", "from . import transformers", "find_spec('safetensors')", "x = 'triton'"):
        (tmp_path / "module.py").write_text(line, encoding="utf-8")
        assert not vendors_in(tmp_path / "module.py"), line


def test_plugins_import_what_the_core_offers_them() -> None:
    """For annotations too: whoever reads a plugin learns from it what to import."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(ROOT / "plugins")
        if path.parts[-2].startswith("kpt_plugin_")
        for name, line in every_import(path)
        if name.startswith("kpt.") and name.split(".")[1] not in OFFERED
    ]
    assert wrong == []


def test_the_core_imports_no_test_suite() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(CORE)
        for name, line in imports(path)
        if name.startswith("kpt.testing") and part_of(path) not in {"testing", "cli"}
    ]
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
    plugins = [path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")]
    assert {"cpu", "huggingface"} <= set(plugins)
    for name in ("kpt_core", *(f"kpt_plugin_{name.replace('-', '_')}" for name in plugins), "kernel_pytorch"):
        assert f"{name}-{kpt.__version__}-py3-none-any.whl" in done.stdout


@pytest.mark.parametrize(
    ("expression", "seen"),
    [("", False), ("not gpu", False), ("not slow", False), ("gpu", True), ("gpu and not slow", True)],
)
def test_only_runs_of_gpu_tests_have_a_gpu_in_sight(tmp_path: Path, expression: str, seen: bool) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  slow\n")
    (tmp_path / "test_sight.py").write_text(
        "import os\n\nimport pytest\n\n\n"
        "NAMES = ('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES')\n\n\n"
        "def seen():\n    return [os.environ[name] for name in NAMES] == ['0', '0']\n\n\n"
        "def test_cpu():\n    assert not seen()\n\n\n@pytest.mark.gpu\ndef test_gpu():\n    assert seen()\n"
    )
    visible = {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        expression,
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **visible})
    failed = not seen and expression != "not gpu"  # there, what needs a GPU is left out
    assert done.stdout.splitlines()[-1].startswith("1 failed" if failed else "1 passed"), done.stdout
