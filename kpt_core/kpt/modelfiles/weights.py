"""Weights into the module that they were saved from, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt.modelfiles.base import Kind, LoadedModel, ModelFileError, Notice, some
from kpt.modelfiles.pickles import sha256
from kpt.plugins import PluginError, load
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line

if TYPE_CHECKING:
    import torch

#: Keys under which training programs nest the weights of a checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "weights", "params", "module")
#: What wrappers put anywhere into the names of tensors: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def weights_in(path: Path, content: Any, tell: Notice) -> dict[str, Any]:
    """The state dict in what a checkpoint holds, under the names that it has there."""
    import torch

    def is_weights(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(key, str) for key in value)
            and any(isinstance(entry, torch.Tensor) for entry in value.values())
        )

    if isinstance(content, Mapping):  # tensors beside the weights (a random state) make it no state dict
        nested = [key for key in _NESTED if is_weights(content.get(key))]
        if nested:
            tell(f"{path}: the weights are the entry {nested[0]!r} of the checkpoint.")
            content = content[nested[0]]
    if not is_weights(content):
        keys = (
            f" with the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else ""
        )
        raise ModelFileError(
            "no-weights",
            f"{path} holds a {type(content).__name__}{keys}; expected a state dict.",
            "Save model.state_dict().",
        )
    return dict(content)


def module_in(path: Path, content: Any, tell: Notice) -> torch.nn.Module | None:
    """The module that an unpickled file is, or that a checkpoint holds beside other things."""
    import torch

    if isinstance(content, Mapping):
        for key in (*_NESTED, "ema"):
            if isinstance(content.get(key), torch.nn.Module):
                tell(f"{path}: the model is the entry {key!r} of the checkpoint.")
                content = content[key]
                break
    return content if isinstance(content, torch.nn.Module) else None


def with_weights(
    path: Path,
    kind: Kind,
    weights: Mapping[str, Any],
    arch: str | None,
    tell: Notice,
    digest: str = "",
) -> LoadedModel:
    """The model that `arch` builds, filled with ``weights``. Raises `ModelFileError`."""
    if arch is None:
        raise ModelFileError(
            "needs-arch",
            f"{path} holds weights alone ({len(weights)} tensors).",
            "Pass --arch module:factory, a class or function that builds the model without arguments.",
        )
    model = build(arch)
    fill(model, _as_the_model_names_them(path, weights, model, tell), path, arch)
    return LoadedModel(model.eval(), kind, path, digest or sha256(path), {"arch": arch})


def _as_the_model_names_them(
    path: Path, weights: Mapping[str, Any], model: torch.nn.Module, tell: Notice
) -> Mapping[str, Any]:
    """``weights`` without what wrappers put into names, and without a prefix that all names share.

    A wrapper that kept the model in an attribute (``module`` of DataParallel, ``model`` of a training
    class) leaves its name in front. A name that the model itself knows is kept as it is.
    """
    known = model.state_dict().keys()

    def unwrapped(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

    found = {name if name in known else unwrapped(name): value for name, value in weights.items()}
    if len(found) != len(weights):
        return weights  # two names became one
    said = sorted({part for name in weights if name not in found for part in name.split(".")} & _WRAPPERS)
    prefix = ""
    while not known & found.keys():
        first = {name.partition(".")[0] + "." for name in found if "." in name}
        if len(first) != 1 or not all("." in name for name in found):
            return weights
        prefix += min(first)
        found = {name.partition(".")[2]: value for name, value in found.items()}
    for part in said:
        tell(f"{path}: {part + '.'!r} is left out of the names.")
    if prefix:
        tell(f"{path}: the prefix {prefix!r} of every name is left out.")
    return found


def build(arch: str) -> torch.nn.Module:
    """The module that the factory ``arch`` (``"module:factory"``) builds. Raises `ModelFileError`."""
    import torch

    try:
        factory = load(arch)
    except PluginError as error:
        raise ModelFileError("bad-arch", error.message, "Pass --arch module:factory.") from error
    model = factory
    if not isinstance(factory, torch.nn.Module):
        if not callable(factory):
            raise ModelFileError(
                "bad-arch",
                f"{arch} is a {type(factory).__name__}; expected a class or function.",
                "Name what builds the model.",
            )
        outcome = attempt(factory)
        if outcome.error is not None:
            raise ModelFileError(
                "bad-arch",
                f"{arch}() raised {one_line(outcome.error)}.",
                "It has to build the model without arguments; write a small function that does.",
            ) from outcome.error
        model = outcome.value
    if not isinstance(model, torch.nn.Module):
        raise ModelFileError(
            "bad-arch",
            f"{arch}() returned {type(model).__name__}; expected a torch.nn.Module.",
            "Name what builds the model.",
        )
    return model


def fill(model: torch.nn.Module, weights: Mapping[str, Any], source: str | Path, arch: str) -> None:
    """Load ``weights`` into ``model``; every tensor must find its place and every place its tensor.

    The model takes the dtypes of the weights, so that nothing is rounded. Raises `ModelFileError`,
    before anything is changed, where names or shapes differ.
    """
    import torch

    expected = model.state_dict(keep_vars=True)
    missing = [name for name in expected if name not in weights]
    # safetensors stores a tied tensor once, and old checkpoints lack BatchNorm's step counter.
    present = {id(tensor) for name, tensor in expected.items() if name in weights}
    missing = [
        name
        for name in missing
        if id(expected[name]) not in present and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in weights if name not in expected]
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights
        and isinstance(tensor, torch.Tensor)
        and isinstance(weights[name], torch.Tensor)
        and tensor.shape != weights[name].shape
    ]
    kinds = [
        f"{name} is {weights[name].dtype}, the model has {tensor.dtype}"
        for name, tensor in expected.items()
        if isinstance(tensor, torch.Tensor)
        and isinstance(weights.get(name), torch.Tensor)
        and tensor.dtype != weights[name].dtype
        and not (tensor.is_floating_point() and weights[name].is_floating_point())
    ]
    shared = len(expected) - len(missing)
    if missing and unexpected and shared * 2 < len(expected):
        raise ModelFileError(
            "wrong-architecture",
            f"{source} is not of the architecture {arch}: {len(missing)} of its {len(expected)} tensors are "
            f"missing ({some(missing)}) and {len(unexpected)} are unknown to it ({some(unexpected)}).",
            "Pass the --arch that the weights were saved from.",
        )
    for code, names, what in (
        ("missing-keys", missing, "lacks"),
        ("unexpected-keys", unexpected, "has tensors that the model does not know:"),
        ("wrong-shapes", wrong, "has other shapes:"),
        ("wrong-dtypes", kinds, "has other dtypes:"),
    ):
        if names:
            raise ModelFileError(
                code,
                f"{source} {what} {some(names)}.",
                f"Check that {arch} builds the model that was saved.",
            )
    for name, tensor in expected.items():
        given = weights.get(name)
        if (
            isinstance(given, torch.Tensor)
            and isinstance(tensor, torch.Tensor)
            and given.dtype != tensor.dtype
        ):
            tensor.data = tensor.data.to(given.dtype)
    model.load_state_dict(weights, strict=False)
