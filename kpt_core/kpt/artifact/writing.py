"""Saving an optimised model."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kpt.artifact import folder as layout
from kpt.artifact import verification
from kpt.artifact.building import how_to_build
from kpt.artifact.folder import ArtifactError
from kpt.artifact.tensors import untied
from kpt.judge.draws import InputSpec
from kpt.transaction import distributed
from kpt.transaction.api import check_module, report, request_of
from kpt.transaction.dispatch import original_forward

if TYPE_CHECKING:
    from kpt.transaction.request import Request


def save(model: torch.nn.Module, path: str | Path, *, build: Mapping[str, str] | None = None) -> Path:
    """Write ``model`` and its plan to the folder ``path``; return the folder.

    The folder appears whole or not at all, and replaces an artifact that is there. ``build`` says how
    `load` makes the model again: ``{"arch": "module:factory"}``. Without it a model of a library whose
    adapter is installed is built by that (from its configuration), a class without constructor
    arguments by its name, and any other model from a pickle of its structure, which `load` reads with
    ``trust=True`` only.

    Raises:
        ValueError: the model was not optimised in this process, or ``build`` names nothing.
        TypeError: ``model`` is no module, or ``build`` no mapping.
        ArtifactError: the folder holds something else, the state dict holds no plain tensors, or a package
            that artifacts are stored with is not installed.
        OSError: the folder cannot be written.
    """
    layout.require_packages()
    target = Path(path)
    if target.is_symlink():  # the link stays, and leads to the new artifact
        target = target.resolve()
    check_module(model, "kpt.save")
    model = distributed.unwrap(model)
    receipt, request = report(model), request_of(model)
    if target.exists() and (
        not target.is_dir() or (any(target.iterdir()) and not (target / layout.RECIPE).is_file())
    ):
        raise ArtifactError(
            "occupied", f"{target} holds something that is not an artifact.", "Choose another folder."
        )
    if target.absolute() in (Path.cwd(), *Path.cwd().parents):
        raise ArtifactError(
            "occupied",
            f"{target} is where the program runs, or above that; an artifact takes a folder's place.",
            "Name another folder.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.parent / f".{target.name}-{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        weights, aliases = untied(model.state_dict())
        layout.write_tensors(weights, scratch / layout.WEIGHTS)
        (scratch / layout.RECEIPT).write_text(receipt.to_json(), encoding="utf-8")
        how = how_to_build(model, build, scratch, request.registry)
        verify = verification.write(model, request.examples, scratch)
        manifest = {
            "schema": layout.SCHEMA,
            "plan": receipt.recipe_data,
            "build": how,
            "aliases": aliases,
            "training": model.training,
            "frozen": [
                name
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if not parameter.requires_grad
            ],
            "request": {
                "level": request.level,
                "objective": request.objective,
                "dynamic_shapes": _plain_shapes(model, request),
            },
            "inputs": receipt.inputs,
            "verify": verify,
            "versions": receipt.versions,
            "hardware": receipt.hardware,
            "accuracy": receipt.accuracy,
            "latency": {
                "before": receipt.seconds_before,
                "after": receipt.seconds_after,
                "speedup": receipt.speedup,
            },
            "files": {
                str(file.relative_to(scratch)): layout.sha256(file)
                for file in sorted(scratch.rglob("*"))
                if file.is_file()
            },
        }
        (scratch / layout.RECIPE).write_text(json.dumps(manifest, indent=2, default=str), encoding="utf-8")
        _as_the_umask_has_it(scratch)
        _put(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def _as_the_umask_has_it(scratch: Path) -> None:
    """Let others read the files as any file that the user writes: some libraries make private ones."""
    mode = (scratch / layout.RECIPE).stat().st_mode & 0o777
    for file in scratch.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _put(scratch: Path, target: Path) -> None:
    """Rename ``scratch`` to ``target``; what was there is gone only once the new one is in place."""
    if not target.exists():
        scratch.replace(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    old = aside / target.name
    try:
        target.replace(old)
        scratch.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        if not old.exists():
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _plain_shapes(model: torch.nn.Module, request: Request) -> dict[str, Any] | None:
    """What was declared, in the one form that JSON holds whichever of its forms the user chose."""
    if not request.dynamic_shapes or not request.examples:
        return None
    spec = InputSpec.from_calls(request.examples, request.dynamic_shapes, original_forward(model))
    ranges = {
        name: [name, dim.low, dim.high if dim.declared else None] for name, dim in spec.dimensions.items()
    }
    return {
        leaf.name: {str(axis): ranges[name] for axis, name in leaf.dims.items()}
        for leaf in spec.leaves
        if leaf.dims
    }
