"""docs/reference/hooks.md, from `kpt.hookspecs` and `kpt.specs`."""

from __future__ import annotations

import inspect
import re
from typing import Any

from kpt import hookspecs, specs
from kpt.specs import hardware, models, ops, passes, services
from reference.markdown import fields, prose, signature, table


def page() -> str:
    """Every hook with the spec it returns, and every behaviour that a spec can name."""
    parts = [
        "# Hooks",
        prose(hookspecs.__doc__).split("\n", 1)[1].strip(),
        f"Entry-point group: `{hookspecs.ENTRY_POINT_GROUP}`. "
        "[Writing a plugin](../writing-a-plugin.md) shows two of them at work.",
        table(
            ["hook", "returns", "what for"],
            [
                [f"[`{name}`](#{name})", f"`{specs.SPEC_TYPES[name].__name__}`", prose(function.__doc__)]
                for name, function in hooks().items()
            ],
        ),
    ]
    for name, function in hooks().items():
        spec = specs.SPEC_TYPES[name]
        parts += [
            f"## `{name}` {{ #{name} }}",
            prose(function.__doc__),
            f"**`{spec.__name__}`** — {prose(spec.__doc__)}",
            fields(spec),
        ]
        named = [kind for kind in behaviours() if re.search(rf"`{kind.__name__}`", spec.__doc__ or "")]
        parts += [f"Behaviour: [`{kind.__name__}`](#{kind.__name__.lower()})." for kind in named]
    parts += ["## Behaviours", 'The attribute that a spec names as `"module:attr"` offers one of these.']
    parts += [behaviour(kind) for kind in behaviours()]
    parts += ["## What behaviours exchange"]
    for kind in (specs.Variant, specs.Skip, specs.Observation, specs.HardwareProfile):
        parts += [f"### `{kind.__name__}` {{ #{kind.__name__.lower()} }}", prose(kind.__doc__), fields(kind)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def hooks() -> dict[str, Any]:
    """Hook functions by name, in the order of the source."""
    return {name: value for name, value in vars(hookspecs).items() if name.startswith("kpt_")}


def behaviours() -> list[type]:
    """The protocols of `kpt.specs`, in the order of the hooks that name them."""
    modules = (hardware, ops, passes, models, services)
    classes = [
        (module, value) for module in modules for value in vars(module).values() if inspect.isclass(value)
    ]
    ours = [kind for module, kind in classes if kind.__module__ == module.__name__]
    return [kind for kind in ours if getattr(kind, "_is_protocol", False)]


def behaviour(kind: type) -> str:
    lines = [f"### `{kind.__name__}` {{ #{kind.__name__.lower()} }}", prose(kind.__doc__)]
    for name, member in vars(kind).items():
        if inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
            if name == "__call__" and "args" in inspect.signature(member).parameters:
                continue
            lines += [f"`{name}{signature(member)}`", prose(member.__doc__)]
    return "\n\n".join(line for line in lines if line)
