"""Loading an artifact: build, fill, verify, apply the recipe, verify again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kpt.artifact import folder as layout
from kpt.artifact import verification
from kpt.artifact.building import build_model
from kpt.artifact.folder import ArtifactError, read_manifest, read_tensors
from kpt.error_text import described
from kpt.judge.draws import InputSpec
from kpt.plugins.isolation import attempt
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
        TypeError: ``model`` is no module, or ``trust`` neither True nor False.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model got {type(model).__name__}; expected a torch.nn.Module that fits the weights")
    if not isinstance(trust, bool):  # a text like "no" would count as yes, and run what the artifact names
        raise TypeError(f"trust={trust!r}; expected True or False")
    folder = Path(path)
    manifest = read_manifest(folder)
    weights = read_tensors(folder / layout.WEIGHTS)
    for alias, name in manifest["aliases"].items():
        if not isinstance(name, str) or name not in weights:
            raise ArtifactError(
                "damaged", f"{alias} is tied to {name}, which is missing.", "Save the artifact again."
            )
        weights[alias] = weights[name]
    built = model if model is not None else build_model(folder, manifest, arch, trust, plugins)
    put_back = _kept(model) if model is not None else None
    try:
        _fill(built, weights, manifest["aliases"], passed=model is not None)
        if model is None:
            _freeze(built, manifest)
        training = bool(manifest.get("training", False))
        if any(module.training is not training for module in built.modules()):
            built.train(training)
        verification.check(built, original_forward(built), folder, manifest, "original")
        _optimise(built, folder, manifest, budget, plugins)
    except BaseException:
        if put_back is not None:
            put_back()
        raise
    return built


def _kept(model: torch.nn.Module) -> Callable[[], None]:
    """Remember the values and the modes of ``model``; return what puts them back."""
    state = model.state_dict(keep_vars=True).values()
    tensors = [
        tensor
        for tensor in state
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not _overlaps(tensor)
    ]
    kept = [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in tensors]
    modes = {module: module.training for module in model.modules()}

    def put_back() -> None:
        with torch.inference_mode():  # where tensors of both kinds may be written
            for tensor, value, version in kept:
                if version is None or tensor._version != version:
                    tensor.copy_(value)
        for module, training in modes.items():
            module.training = training

    return put_back


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor do: torch writes to no such tensor."""
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _freeze(model: torch.nn.Module, manifest: dict[str, Any]) -> None:
    """Train what the model that was saved trained, whatever builds it."""
    frozen = manifest.get("frozen")
    if frozen is None:  # written by a version that did not say
        return
    if not isinstance(frozen, list):
        raise ArtifactError(
            "damaged", f"{layout.RECIPE} has {type(frozen).__name__} as 'frozen'.", "Save the artifact again."
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)


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
    assign = bool(on_meta or kinds) or (not passed and any(map(_overlaps, expected.values())))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {a: n for a, n in aliases.items() if a in parameters and parameters[a] is parameters.get(n)}
    loaded = attempt(model.load_state_dict, weights, assign=assign)
    if loaded.error is not None:
        raise ArtifactError(
            "not-loadable",
            f"{type(model).__name__} does not take the weights: {' '.join(described(loaded.error).split())}",
            "Its load_state_dict has to take what its state_dict returned.",
        ) from loaded.error
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
        _check_shapes(model, request)
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


def _check_shapes(model: torch.nn.Module, request: Request) -> None:
    """Whether the declared dimensions are those of the stored call. Raises `ArtifactError`."""
    try:
        InputSpec.from_calls(request.examples or [], request.dynamic_shapes, original_forward(model))
    except (OverflowError, TypeError, ValueError) as error:
        raise ArtifactError(
            "damaged",
            f"{layout.RECIPE} has dynamic_shapes that do not fit the call in {layout.VERIFY}/: {error}.",
            "Save the artifact again.",
        ) from error


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
