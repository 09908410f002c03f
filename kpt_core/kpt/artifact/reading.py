"""Loading an artifact: build, fill, verify, apply the recipe, verify again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kpt.artifact import folder as layout
from kpt.artifact import verification
from kpt.artifact.building import build_model
from kpt.artifact.folder import ArtifactError, read_manifest, read_tensors
from kpt.transaction.api import make_request, remember, run
from kpt.transaction.dispatch import original_forward, plan_of
from kpt.transaction.receipt import Receipt
from kpt.transaction.request import Request


def load(
    path: str | Path,
    *,
    model: torch.nn.Module | None = None,
    arch: str | None = None,
    trust: bool = False,
    budget: float = 120.0,
    plugins: Sequence[Any] | None = None,
) -> torch.nn.Module:
    """The optimised model in the folder ``path``.

    The weights are put into ``model``, or into what ``arch`` ("module:factory") builds, or into what
    the artifact says; ``plugins`` selects who optimises, and the adapter that builds may be any installed
    plugin's. The original is checked against ``verify/``, then the recipe is applied, judged
    on fresh inputs and checked again. A recipe that does not hold here (other hardware, a missing
    plugin) leaves the model unoptimised, with a warning; `kpt.report` says why.

    Raises:
        ArtifactError: damaged or foreign files, a pickle without ``trust=True``, weights that do not
            fit (names, shapes, or the dtypes of a ``model`` that was passed), outputs that are not those
            that were saved. A ``model`` that was passed is unchanged then: its values and its modes.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    weights = read_tensors(folder / layout.WEIGHTS)
    for alias, name in dict(manifest.get("aliases") or {}).items():
        if name not in weights:
            raise ArtifactError(
                "damaged", f"{alias} is tied to {name}, which is missing.", "Save the artifact again."
            )
        weights[alias] = weights[name]
    built = model if model is not None else build_model(folder, manifest, arch, trust, plugins)
    before = (
        {name: t.detach().clone() for name, t in built.state_dict().items()} if model is not None else None
    )
    modes = {module: module.training for module in built.modules()}
    try:
        _fill(built, weights, dict(manifest.get("aliases") or {}), passed=model is not None)
        training = bool(manifest.get("training", False))
        if any(module.training is not training for module in built.modules()):
            built.train(training)
        verification.check(built, original_forward(built), folder, manifest, "original")
        _optimise(built, folder, manifest, budget, plugins)
    except BaseException:
        if before is not None:
            built.load_state_dict(before)
            for module, training in modes.items():
                module.training = training
        raise
    return built


def _fill(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], aliases: dict[str, str], *, passed: bool
) -> None:
    """Put the weights into the model; into the parameters that are there, if it was ``passed``."""
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    wrong = [n for n in expected if n in weights and expected[n].shape != weights[n].shape]
    if missing or unexpected or wrong:
        facts = [
            f"{len(names)} {what} ({', '.join(names[:4])})"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
            if names
        ]
        raise ArtifactError(
            "wrong-architecture",
            f"The weights do not fit {type(model).__name__}: {'; '.join(facts)}.",
            "Build the model that was saved.",
        )
    on_meta = [n for n, t in expected.items() if t.device.type == "meta"]
    kinds = [n for n in expected if expected[n].dtype != weights[n].dtype]
    if passed and (on_meta or kinds):
        # New parameters would leave an optimizer, or whoever else holds the old ones, behind.
        name = (kinds or on_meta)[0]
        mine, stored = expected[name], weights[name]
        raise ArtifactError(
            "wrong-dtype" if kinds else "on-meta",
            f"{name} is stored as {stored.dtype}; the model that was passed has it as {mine.dtype} on "
            f"{mine.device}.",
            f"Pass a model of {stored.dtype} whose parameters hold memory (model.to, model.to_empty), "
            "or arch= in place of model=.",
        )
    assign = bool(on_meta or kinds)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {a: n for a, n in aliases.items() if a in parameters and parameters[a] is parameters.get(n)}
    model.load_state_dict(weights, assign=assign)
    if assign:  # which gives every name a parameter of its own
        for alias, name in tied.items():
            owner, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def _optimise(
    model: torch.nn.Module,
    folder: Path,
    manifest: dict[str, Any],
    budget: float,
    plugins: Sequence[Any] | None,
) -> None:
    recipe, described = manifest["plan"], manifest["verify"]
    request = _request(model, manifest, budget, plugins)
    if described:
        request.examples = [verification.stored_call(model, folder, described)]
    if not recipe or not recipe.get("steps") or not described:
        remember(model, _stored_receipt(folder), request)
        return
    request.plan, request.only_plan = recipe, True
    receipt = run(model, request.examples, request)
    if not receipt.optimized:
        warnings.warn(
            f"the recipe of {folder} does not hold here, so the model is not optimised: {receipt.reason}; "
            "call kpt.optimize(model, ...) to search anew",
            stacklevel=3,
        )
        return
    verification.check(model, model.forward, folder, manifest, "optimized")
    plan_of(model).reset_counters()  # the check above was no call of the user's


def _request(
    model: torch.nn.Module, manifest: dict[str, Any], budget: float, plugins: Sequence[Any] | None
) -> Request:
    asked = manifest["request"]
    try:
        shapes = {
            name: {int(axis): d if isinstance(d, str) else tuple(d) for axis, d in axes.items()}
            for name, axes in (asked.get("dynamic_shapes") or {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(
            "damaged",
            f"{layout.RECIPE} has dynamic_shapes that are none: {error}.",
            "Save the artifact again.",
        ) from error
    return make_request(
        model,
        level=asked["level"],
        objective=asked["objective"],
        dynamic_shapes=shapes or None,
        budget=budget,
        plugins=plugins,
    )


def _stored_receipt(folder: Path) -> Receipt:
    """What the run on the saved model found, for a model that is loaded without a plan."""
    path = folder / layout.RECEIPT
    try:
        receipt = Receipt.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            "damaged", f"{path} is not a receipt: {error}.", "Save the artifact again."
        ) from error
    if receipt.status != "original":
        receipt.status = "original"
        receipt.reason = (
            "the artifact holds no plan with a call to judge it with; call kpt.optimize(model, ...)"
        )
    return receipt
