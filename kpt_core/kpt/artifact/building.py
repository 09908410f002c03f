"""How a model is built again without its weights: what is written down, and how it is read."""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kpt.artifact import folder as layout
from kpt.artifact.folder import ArtifactError
from kpt.judge.bitwise import bitwise_equal
from kpt.modelfiles import ModelFileError, load_model
from kpt.modelfiles.adapters import LAYOUTS, adapters, adapters_for, missing
from kpt.modelfiles.weights import build
from kpt.plugins import registry as selected_plugins
from kpt.plugins.isolation import REFERENCE, attempt
from kpt.plugins.status import one_line
from kpt.specs import AdapterError
from kpt.transaction import workspace
from kpt.transaction.structure import NOT_ATTRIBUTES

if TYPE_CHECKING:
    from kpt.plugins import Registry
    from kpt.specs import Adapter


_PLAIN = (bool, int, float, complex, str, bytes, frozenset, set, torch.dtype, torch.device)


def how_to_build(
    model: torch.nn.Module, named: Mapping[str, str] | None, scratch: Path, registry: Registry
) -> dict[str, Any]:
    """What `build_model` makes ``model`` from, as JSON values; files go into ``scratch``.

    In order: what the user ``named``, what a model library's adapter writes down, the class by its name
    if it takes no arguments, a pickle of the structure. Raises `ArtifactError` where none works.
    """
    if named:
        return {"kind": "named", **_checked(named)}
    described = _described(model, scratch, registry)
    if described is not None:
        return described
    cls = type(model)
    reference = f"{cls.__module__}:{cls.__qualname__}"
    if _builds_alone(cls, model):
        return {"kind": "class", "arch": reference}
    on_meta = {id(p): _on_meta(p) for p in model.parameters()}
    copy = workspace.clone(model, on_meta, hooks=lambda model, hook: False)
    for part in copy.modules():
        part.training = False  # `eval` may do more, and that of an exported program raises
    try:
        torch.save(copy, str(scratch / layout.STRUCTURE))
    except Exception as error:
        (scratch / layout.STRUCTURE).unlink(missing_ok=True)
        raise ArtifactError(
            "not-buildable",
            f"{cls.__name__} can neither be built by name nor pickled ({type(error).__name__}: {error}).",
            'Pass build={"arch": "module:factory"}, a function that builds the model.',
        ) from error
    if cls.__module__ == "__main__":
        warnings.warn(
            f"{cls.__name__} is defined in a script: kpt.load builds it only in a program that defines it "
            'too. Move it to a module, or pass build={"arch": "module:factory"}.',
            stacklevel=3,
        )
    return {"kind": "pickle", "class": reference}


def _checked(named: Any) -> dict[str, str]:
    """What the user says the model is built by. Raises `TypeError` or `ValueError` where it says nothing."""
    expected = 'expected {"arch": "module:factory"} or {"folder": path}'
    if not isinstance(named, Mapping):
        raise TypeError(f"build={named!r}; {expected}")
    if len(named) != 1 or not all(
        key in ("arch", "folder") and isinstance(value, str) and value for key, value in named.items()
    ):
        raise ValueError(f"build={dict(named)!r}; {expected}")
    if "arch" in named and not REFERENCE.fullmatch(named["arch"]):
        raise ValueError(f"build={dict(named)!r}, which is no reference; {expected}")
    return dict(named)


def loading_call(folder: Path) -> str:
    """The call of `kpt.load` that builds the model of the artifact just written to ``folder``.

    What the artifact names is imported, and a pickle is read, only where the call says so.
    """
    how = json.loads((folder / layout.RECIPE).read_text(encoding="utf-8"))["build"]
    arguments = [repr(str(folder))]
    if how.get("arch"):
        arguments.append(f"arch={how['arch']!r}")
    elif how.get("kind") != "adapter":
        arguments.append("trust=True")
    return f"kpt.load({', '.join(arguments)})"


def build_model(
    folder: Path,
    manifest: Mapping[str, Any],
    arch: str | None,
    trust: bool,
    plugins: Sequence[Any] | None,
) -> torch.nn.Module:
    """The model of the artifact in ``folder``, its weights unspecified. Raises `ArtifactError`."""
    how = manifest["build"]
    if arch is not None:
        return _named(arch)
    kind = how.get("kind")
    if kind == "adapter":
        return _by_adapter(how, folder, selected_plugins(plugins))
    if kind == "pickle":
        file = folder / layout.STRUCTURE
        if not trust:
            raise ArtifactError(
                "untrusted",
                f"{how.get('class')} is stored as a pickle, which runs code when it is read.",
                "Pass model= or arch=, or trust=True (--trust-model) if you trust where it comes from.",
            )
        return _unpickled(file, str(how.get("class")))
    if kind in ("named", "class") and (how.get("arch") or how.get("folder")):
        if not trust and not _known_class(str(how.get("arch", ""))):
            raise ArtifactError(
                "untrusted",
                f"The model is built by {how.get('arch') or how.get('folder')}, which the artifact names.",
                f"Pass arch={how.get('arch')!r} if you know it, or trust=True (--trust-model).",
            )
        if how.get("arch"):
            return _named(str(how["arch"]))
        return _as_artifact_error(lambda: load_model(str(how["folder"]), trust=trust).model)
    raise ArtifactError(
        "not-buildable", "The artifact does not say how its model is built.", "Pass model= or arch=."
    )


def _named(arch: str) -> torch.nn.Module:
    return _as_artifact_error(lambda: build(arch))


def _as_artifact_error(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    try:
        return make()
    except ModelFileError as error:
        raise ArtifactError(error.code, error.message, error.hint) from error


def _unpickled(file: Path, cls: str) -> torch.nn.Module:
    outcome = attempt(torch.load, str(file), weights_only=False, map_location="cpu")
    if outcome.error is None and isinstance(outcome.value, torch.nn.Module):
        return outcome.value
    what = one_line(outcome.error) if outcome.error else f"it is a {type(outcome.value).__name__}"
    raise ArtifactError(
        "not-buildable",
        f"The structure of {cls} cannot be unpickled: {what}.",
        "Load it where the modules that define its classes can be imported, or pass model= or arch=.",
    ) from outcome.error


def _registries(first: Registry) -> Iterator[Registry]:
    """``first``, then every plugin that the environment allows: a selection says who optimises."""
    yield first
    yield selected_plugins()


def _described(model: torch.nn.Module, scratch: Path, registry: Registry) -> dict[str, Any] | None:
    asked = set()
    for plugins in _registries(registry):
        for registered, adapter in adapters_for(model, plugins, _warn):
            if registered.spec in asked:
                continue
            asked.add(registered.spec)
            outcome = attempt(_describe, adapter, model, scratch)
            if outcome.error is not None:
                _warn(f"{registered.owner} cannot say how the model is built: {one_line(outcome.error)}")
            elif outcome.value is not None:
                name = registered.spec.name
                return {"kind": "adapter", "adapter": name, "description": outcome.value}
    return None


def _describe(adapter: Adapter, model: torch.nn.Module, scratch: Path) -> dict[str, Any] | None:
    """What ``adapter`` writes down of ``model``, as plain JSON; its files go into ``scratch`` if it does."""
    inner = Path(tempfile.mkdtemp(dir=scratch))
    try:
        found = adapter.describe(model, str(inner))
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise TypeError(f"its describe returned {type(found).__name__}; expected a mapping or None")
        plain: dict[str, Any] = json.loads(json.dumps(dict(found)))
        taken = [file.name for file in inner.iterdir() if file.name in layout.OWN]
        if taken:
            raise ValueError(f"its describe wrote {', '.join(sorted(taken))}, which is a file of the core's")
        for file in inner.iterdir():
            file.replace(scratch / file.name)
        return plain
    finally:
        shutil.rmtree(inner, ignore_errors=True)


def _by_adapter(how: Mapping[str, Any], folder: Path, registry: Registry) -> torch.nn.Module:
    name = how.get("adapter")
    for plugins in _registries(registry):
        for registered, adapter in adapters(plugins, _warn):
            if registered.spec.name != name:
                continue
            outcome = attempt(adapter.build, dict(how.get("description") or {}), str(folder))
            if isinstance(outcome.error, AdapterError):
                error = outcome.error
                raise ArtifactError(error.code, error.message, error.hint) from error
            if outcome.error is None and isinstance(outcome.value, torch.nn.Module):
                return outcome.value.eval()
            what = one_line(outcome.error) if outcome.error else f"it returned {type(outcome.value).__name__}"
            raise ArtifactError(
                "not-buildable",
                f"{registered.owner} could not build the model: {what}.",
                "Install the versions named in recipe.json, or pass model= or arch=.",
            ) from outcome.error
    if name in LAYOUTS.values():
        reason, mend = missing(str(name), selected_plugins())
        raise ArtifactError(
            "missing-plugin",
            f"Building the model needs {reason}.",
            f"To mend it: {mend}. Or pass model= or arch=.",
        )
    raise ArtifactError(
        "missing-plugin",
        f"The model is built by the adapter {name!r}, which no plugin in use offers.",
        "Install the plugin that the model was saved with, or pass model= or arch=.",
    )


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def _known_class(arch: str) -> bool:
    """Whether ``arch`` names a class of modules that the program has imported itself.

    Importing a module runs it, and calling what an artifact names runs that: ``os:abort`` is imported
    in every process. So are only looked up, without any import, classes of modules.
    """
    module_name, _, path = arch.partition(":")
    found: Any = sys.modules.get(module_name)
    for name in path.split("."):
        # Not `getattr`: a module or a class may compute attributes, which runs code.
        found = vars(found).get(name) if isinstance(found, (types.ModuleType, type)) else None
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _builds_alone(cls: type, model: torch.nn.Module) -> bool:
    """Whether the importable class, called without arguments, gives the same parameters and buffers."""
    if (
        "<locals>" in cls.__qualname__
        or cls.__module__ in ("__main__", "builtins")
        or cls.__module__.startswith("torch.")
    ):
        return False
    state = torch.get_rng_state()
    try:
        built = cls()
    except Exception:  # noqa: BLE001 - it needs arguments, so it is not built this way
        return False
    finally:
        torch.set_rng_state(state)
    mine, other = model.state_dict(), built.state_dict()
    modules, others = list(model.modules()), list(built.modules())
    return (
        mine.keys() == other.keys()
        and all(mine[k].shape == other[k].shape for k in mine)
        and repr(built) == repr(model)
        and len(modules) == len(others)
        and all(map(_same_facts, modules, others))
    )


def _same_facts(module: torch.nn.Module, built: torch.nn.Module) -> bool:
    """Whether attributes and the buffers that no state dict holds are what the constructor sets."""

    def facts(of: torch.nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(of).items() if name not in NOT_ATTRIBUTES}

    hidden = module._non_persistent_buffers_set
    return (
        _alike(facts(module), facts(built))
        and hidden == built._non_persistent_buffers_set
        and all(_equal(module._buffers[name], built._buffers[name]) for name in hidden)
    )


def _alike(mine: Any, other: Any, depth: int = 4) -> bool:
    """Whether two values decide alike what a forward computes, as far as that can be seen.

    Modules and parameters are compared elsewhere; of an object that shows nothing the type is enough.
    """
    if mine is other or depth == 0:
        return True
    if type(mine) is not type(other):
        return False
    if isinstance(mine, (torch.nn.Module, torch.nn.Parameter)):
        return True
    if isinstance(mine, torch.Tensor):
        return _equal(mine, other)
    if isinstance(mine, types.MethodType):
        return _alike(mine.__func__, other.__func__, depth)
    if isinstance(mine, types.FunctionType):
        return mine.__code__ == other.__code__ and _alike(_held(mine), _held(other), depth - 1)
    if isinstance(mine, functools.partial):
        return _alike((mine.func, mine.args, mine.keywords), (other.func, other.args, other.keywords), depth)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(other) and all(_alike(one, two, depth - 1) for one, two in zip(mine, other))
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(_alike(mine[k], other[k], depth - 1) for k in mine)
    if isinstance(mine, _PLAIN):
        return bool(mine == other)
    if isinstance(mine, (type, types.BuiltinFunctionType)):
        return False
    inside = getattr(mine, "__dict__", None)
    return inside is None or _alike(inside, vars(other), depth - 1)


def _held(function: types.FunctionType) -> list[Any]:
    """What a function holds beside its code."""
    variables = inspect.getclosurevars(function).nonlocals
    return [function.__defaults__, function.__kwdefaults__, dict(variables)]


def _equal(mine: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return bitwise_equal(mine, other)


def _on_meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(
        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
    )
