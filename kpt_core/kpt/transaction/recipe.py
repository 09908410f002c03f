"""Recipes: accepted plans as JSON in the user's cache, so that a second process need not search.

A recipe is data. It names variants by plugin and pass; nothing executable is ever read. The folder
must be the user's own, with mode 0700, and no link; whatever is odd about it is treated as a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import platform
from typing import TYPE_CHECKING, Any

import torch

from kpt import user_cache
from kpt.plugins.discovery import requirements
from kpt.specs import LEVELS, PHASES, Variant
from kpt.transaction.reading import is_own
from kpt.transaction.receipt import Entry

if TYPE_CHECKING:
    from pathlib import Path

    from kpt.judge.draws import InputSpec
    from kpt.transaction.observe import Observation
    from kpt.transaction.plan import Plan

SCHEMA = 1
_PLAIN = (bool, int, float, str, type(None))
_FOLDER = "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says why."""


def cache_folder() -> Path:
    """Where recipes are kept: below ``KPT_CACHE_DIR``, or in the user's cache folder."""
    return user_cache.root() / _FOLDER


def key_of(observation: Observation, registry: Any, facts: dict[str, Any]) -> str:
    """A hash of everything that a plan's worth and rightness may depend on."""
    text = json.dumps({**_identity(observation, registry), **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(observation: Observation, registry: Any) -> dict[str, Any]:
    model = observation.model
    return {
        "schema": SCHEMA,
        "structure": structure_hash(model),
        "inputs": _inputs(observation.spec),
        "level": observation.level,
        "objective": observation.objective,
        "mode": observation.mode,
        "ambient": observation.ambient,
        "deterministic": observation.deterministic,
        "tf32": [torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled],
        "threads": [torch.get_num_threads(), _affinity()],
        "world_size": _world_size(),
        "hardware": [
            observation.hardware.name,
            observation.hardware.vendor,
            observation.hardware.architecture,
            observation.hardware.compute_units,
            list(observation.hardware.features),
        ],
        "versions": versions(registry),
    }


def _inputs(spec: InputSpec) -> dict[str, Any]:
    """What is alike about the inputs of two processes that do the same: not the values of their examples.

    Static sizes, dtypes and constants are in the signatures. Of a dynamic dimension counts the power of two
    that its largest example stays within: what pays at 8 tokens is no answer for 500.
    """
    return {
        "signatures": spec.to_dict()["signatures"],
        "leaves": [
            [leaf.name, leaf.dims, leaf.role, leaf.form.kind, None if leaf.dims else leaf.strides]
            for leaf in spec.leaves
        ],
        "dimensions": [
            [
                dimension.name,
                [dimension.low, dimension.high] if dimension.declared else None,
                (max(dimension.observed, default=1) - 1).bit_length(),
            ]
            for dimension in spec.dimensions.values()
        ],
    }


def versions(registry: Any) -> dict[str, str]:
    """Versions of Python, torch, kpt, every plugin, what plugins need, and of Triton and transformers.

    A plan of a compiler says nothing of the next release of that compiler.
    """
    import kpt

    found = {"python": platform.python_version(), "torch": torch.__version__, "kpt": kpt.__version__}
    found |= {name: version for name, version in _libraries(registry).items() if name not in found}
    found.update({f"plugin:{name}": str(value) for name, value in registry.fingerprint().items()})
    return found


def _libraries(registry: Any) -> dict[str, str]:
    """Installed versions of packages that plans or models are made of."""
    from importlib.metadata import PackageNotFoundError, version

    in_use = (status.distribution for status in registry.statuses if status.hooks and status.distribution)
    found = requirements(in_use)
    for name in ("triton", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return dict(sorted(found.items()))


def structure_hash(model: torch.nn.Module) -> str:
    """A hash of the module tree: sources of classes and bases, shapes, dtypes, attributes, trainability."""
    digest = hashlib.sha256()
    sources: dict[type, str] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in sources:
            sources[cls] = _source_of(cls)
        attributes = {
            key: value for key, value in vars(module).items() if _shown(cls, key) and _is_plain(value)
        }
        digest.update(
            f"{name}|{cls.__module__}.{cls.__qualname__}|{sources[cls]}|{sorted(attributes.items())}".encode()
        )
        for kind in (module._parameters, module._buffers):
            for key, tensor in kind.items():
                if tensor is not None:
                    digest.update(
                        f"{key}{tuple(tensor.shape)}{tensor.dtype}{tensor.device}{tensor.requires_grad}".encode()
                    )
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=False).encode())
    return digest.hexdigest()


def _shown(cls: type, name: str) -> bool:
    """Whether an attribute is public, or what a property of that name keeps: which adapter is active, say."""
    return not name.startswith("_") or isinstance(getattr(cls, name[1:], None), property)


def _is_plain(value: Any) -> bool:
    """Whether a value is a constant, or a list of some."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _source_of(cls: type) -> str:
    """A hash of the source of a class and of those of its bases that are no installed library's."""
    digest = hashlib.sha256()
    for base in (cls, *(base for base in cls.__mro__[1:] if is_own(base.__module__, ""))):
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            source = "no source"
        digest.update(f"{base.__module__}.{base.__qualname__}|{source}|".encode())
    return digest.hexdigest()


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


# ---------------------------------------------------------------------------------------------
# Reading and writing


def to_dict(plan: Plan, key: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A plan as a recipe."""
    return {
        "schema": SCHEMA,
        "key": key,
        "steps": [step.to_dict() for step in plan.steps],
        "figures": figures,
    }


def check(data: Any) -> dict[str, Any]:
    """``data`` if it is a well-formed recipe.

    Raises:
        RecipeError: another schema version, or fields that a recipe cannot have.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"a recipe is a JSON object; found {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise RecipeError(f"recipe schema {data.get('schema')!r}; this version of kpt reads {SCHEMA}")
    steps = data.get("steps")
    if not isinstance(steps, list):
        raise RecipeError("the recipe has no list of steps")
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("variant"), dict):
            raise RecipeError("a step of the recipe is malformed")
        if step.get("phase") not in PHASES or not isinstance(step.get("source"), str):
            raise RecipeError(f"a step of the recipe names an unknown phase {step.get('phase')!r}")
        variant_of(step["variant"])
    _check_figures(data.get("figures", {}))
    return data


def _check_figures(figures: Any) -> None:
    if not isinstance(figures, dict) or not all(
        isinstance(figures.get(name, {}), dict) for name in ("gains", "doubts")
    ):
        raise RecipeError("the figures of the recipe are malformed")
    if not all(isinstance(text, str) for text in figures.get("doubts", {}).values()):
        raise RecipeError("the doubts of the recipe are malformed")
    if not isinstance(figures.get("mixtures", []), list):
        raise RecipeError("the mixtures of calls of the recipe are malformed")
    rejected = figures.get("rejected", [])
    if not isinstance(rejected, list):
        raise RecipeError("the rejections of the recipe are malformed")
    for entry in rejected:
        try:
            Entry(**entry)
        except TypeError as error:
            raise RecipeError(f"a rejection of the recipe is malformed ({error})") from None


def variant_of(data: dict[str, Any]) -> Variant:
    """The variant that a step describes.

    Raises:
        RecipeError: unknown or mistyped fields.
    """
    unknown = set(data) - set(Variant.__dataclass_fields__)
    if unknown or not isinstance(data.get("name"), str) or not isinstance(data.get("params", {}), dict):
        raise RecipeError(
            f"a variant of the recipe is malformed ({', '.join(sorted(unknown)) or 'name or params'})"
        )
    if data.get("level") not in (None, *LEVELS):
        raise RecipeError(f"a variant of the recipe has an unknown level {data.get('level')!r}")
    sites = data.get("sites", ("",))
    if not isinstance(sites, (list, tuple)) or not all(isinstance(site, str) for site in sites):
        raise RecipeError("the sites of a variant of the recipe are malformed")
    return Variant(**{**data, "sites": tuple(sites)})


def read(key: str) -> tuple[dict[str, Any] | None, str]:
    """The recipe for ``key`` and "hit", or None and why there is none."""
    path = cache_folder() / f"{key}.json"
    try:
        user_cache.folder(_FOLDER)
        wrapped = user_cache.read_json(path)
    except user_cache.CacheError as error:
        return None, f"refused ({error.message})"
    if wrapped is None:
        return None, "miss"
    try:
        body = wrapped["recipe"]
        if wrapped["sha256"] != _digest(body):
            raise RecipeError("its checksum does not match")
        data = check(body)
        if data.get("key") != key:
            raise RecipeError("it belongs to another model or setting")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"refused ({path.name}: {error})"
    return data, "hit"


def write(key: str, recipe: dict[str, Any]) -> str | None:
    """Store a recipe; return why it could not be stored, or None."""
    body = json.loads(json.dumps(recipe, default=str))
    try:
        folder = user_cache.folder(_FOLDER)
        user_cache.write_json(folder / f"{key}.json", {"sha256": _digest(body), "recipe": body})
    except (user_cache.CacheError, OSError) as error:
        return f"the recipe could not be stored: {getattr(error, 'message', error)}"
    return None


def forget(key: str) -> None:
    """Remove a recipe that did not hold."""
    with contextlib.suppress(OSError):  # one that cannot be removed is refused again next time
        (cache_folder() / f"{key}.json").unlink(missing_ok=True)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
