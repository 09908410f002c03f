"""``kpt plugins new``: a plugin that works, to start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from kpt import __version__
from kpt.cli.options import Json
from kpt.cli.output import Output, usage

_PREFIX = "kpt-plugin-"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The plugin's name: lower case, digits and dashes.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where to write it; default: kpt-plugin-NAME.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the skeleton of a plugin: a pass and a kernel that work, and the tests that show it."""
    output: Output = context.obj
    if not _NAME.fullmatch(name):
        raise usage(
            f"{name!r} cannot be the name of a plugin.", "Use lower case, digits and dashes: my-kernels."
        )
    name = name.removeprefix(_PREFIX)
    distribution = f"{_PREFIX}{name}"
    target = Path.cwd() / distribution if folder is None else folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise usage(f"{target} exists and is not empty.", "Name another folder.")
    package = distribution.replace("-", "_")
    written = []
    for path, text in skeleton(name, distribution, package).items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        written.append(str(path))
    commands = [f"pip install -e {target}", f"kpt plugins check {name}", f"pytest {target}"]
    shown = "\n".join(
        [f"{target}", *(f"  {path}" for path in written), "", "Next:", *(f"  {step}" for step in commands)]
    )
    output.result({"folder": str(target), "files": written, "next": commands}, shown)


def skeleton(name: str, distribution: str, package: str) -> dict[Path, str]:
    """The files of a new plugin by their relative path."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    ceiling = f"{major}.{minor + 1}" if major == 0 else str(major + 1)
    values = {
        "NAME": name,
        "DISTRIBUTION": distribution,
        "PACKAGE": package,
        "CORE": f"kpt-core>={major}.{minor},<{ceiling}",
        "CLASS": "".join(part.capitalize() for part in name.split("-")),
    }
    return {
        Path(_fill(path, values)): _fill(text, values)
        for path, text in (
            ("pyproject.toml", _PYPROJECT),
            ("README.md", _README),
            ("PACKAGE/__init__.py", '"""The NAME plugin of KernelPyTorch."""\n'),
            ("PACKAGE/hooks.py", _HOOKS),
            ("PACKAGE/kernels.py", _KERNELS),
            ("PACKAGE/passes.py", _PASSES),
            ("tests/test_NAME.py", _TESTS),
        )
    }


def _fill(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(
            key, value.replace("-", "_") if key == "NAME" and text.startswith("tests/") else value
        )
    return text


_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "DISTRIBUTION"
version = "0.1.0"
description = "The NAME plugin of KernelPyTorch."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["CORE", "torch>=2.11"]

[project.entry-points."kpt.plugins"]
NAME = "PACKAGE.hooks"

[tool.hatch.build.targets.wheel]
packages = ["PACKAGE"]
"""

_README = """\
# DISTRIBUTION

A plugin of KernelPyTorch.

    pip install -e .
    kpt plugins show NAME
    kpt plugins check NAME
    pytest
"""

_HOOKS = '''\
"""What this plugin offers. Only names: code is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterable

import kpt
from kpt.specs import KernelSpec, PassSpec


@kpt.hookimpl
def kpt_kernels() -> Iterable[KernelSpec]:
    yield KernelSpec(
        op="softmax",
        name="NAME.softmax",
        entry="PACKAGE.kernels:softmax",
        dtypes=("float32", "bfloat16"),
        backward=True,
        compile_safe=True,
        reproducible=True,
        source="torch.softmax",
    )


@kpt.hookimpl
def kpt_passes() -> Iterable[PassSpec]:
    yield PassSpec(
        name="NAME.drop_identities",
        phase="layout",
        entry="PACKAGE.passes:DropIdentities",
        level="exact",
        modes=("inference", "training"),
        summary="Leaves out modules that return what they are given.",
    )
'''

_KERNELS = '''\
"""Kernels. Each has the signature of its op's reference; `kpt explain` and the docs list the ops."""

from __future__ import annotations

import torch


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The softmax of ``x`` over ``dim``; replace this by a kernel that is faster."""
    return torch.softmax(x, dim)
'''

_PASSES = '''\
"""Passes. A pass proposes variants with a predicted gain, applies one to a workspace, and undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kpt.specs import Skip, Variant

if TYPE_CHECKING:
    from kpt.specs import HardwareProfile, Observation, Undo


class Dropped(nn.Module):
    """Stands for an identity that was left out, so that indices and names stay."""

    def forward(self, x: Any) -> Any:
        return x


class DropIdentities:
    """Replaces each `nn.Identity` by a module that takes its argument without ``*args``."""

    def propose(self, observation: Observation, hardware: HardwareProfile) -> Iterable[Variant | Skip]:
        number = len(list(identities(observation.model)))
        if not number:
            yield Skip("the model has no nn.Identity")
        else:
            yield Variant("drop", predicted_gain=1.001, reproducible=True, note=f"{number} modules")

    def apply(self, model: nn.Module, variant: Variant) -> Undo:
        # The model is a workspace: its modules may change, its parameters are the user's own.
        replaced = [(parent, name, parent._modules[name]) for parent, name in identities(model)]
        for parent, name, _ in replaced:
            parent._modules[name] = Dropped()

        def undo() -> None:
            for parent, name, module in replaced:
                parent._modules[name] = module

        return undo

    def verify_applied(self, model: nn.Module) -> bool:
        return any(isinstance(module, Dropped) for module in model.modules())


def identities(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of each `nn.Identity` below ``model``."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Identity:
                yield parent, name
'''

_TESTS = '''\
"""The standard tests of every plugin and kernel, and this plugin's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kpt.testing import KernelSuite, PluginSuite
from torch import nn

from PACKAGE import hooks


class TestCLASS(PluginSuite):
    plugin = hooks

    def models(self) -> Mapping[str, tuple[nn.Module, Any]]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Softmax(dim=-1)).eval()
        return {**super().models(), "with an identity": (model, torch.randn(2, 8))}


class TestSoftmax(KernelSuite):
    kernel = next(iter(hooks.kpt_kernels()))


def test_an_identity_is_dropped() -> None:
    from PACKAGE.passes import DropIdentities, identities

    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    undo = DropIdentities().apply(model, None)
    assert not list(identities(model))
    undo()
    assert len(list(identities(model))) == 1
'''
