"""Put a kernel at a site of a workspace, and take it away again."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from kpt.ops.rebind import bind_function
from kpt.ops.sites import Site


def install(root: torch.nn.Module, site: Site, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Let ``kernel`` serve ``site`` inside ``root`` (a workspace); return what undoes it.

    Only attributes of the module instance at ``site.path`` change.
    """
    module = root.get_submodule(site.path)
    if site.kind == "module":
        current = module.forward
        own = getattr(current, "__func__", None) if getattr(current, "__self__", None) is module else None
        bound: Any = types.MethodType(site.binding.forward(kernel, own or type(module).forward), module)
    elif site.callee.startswith("self."):
        return _install_held(module, site, kernel)
    elif site.kind in ("function", "call"):
        bound = bind_function(module, site, kernel)
    else:
        raise ValueError(f"a site of kind {site.kind!r} is installed with kpt.ops.substitute, not install")
    before = module.__dict__.get(site.attribute)
    had = site.attribute in module.__dict__
    module.__dict__[site.attribute] = bound

    def undo() -> None:
        if had:
            module.__dict__[site.attribute] = before
        else:
            module.__dict__.pop(site.attribute, None)

    return undo


def _install_held(module: torch.nn.Module, site: Site, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Replace a function that the module holds as an attribute, through its property if it has one."""
    name = site.callee.removeprefix("self.")
    assert site.original is not None
    before = dict(module.__dict__)
    function = site.binding.function(kernel, site.original, module)
    setattr(module, name, function)
    changed = [key for key, value in module.__dict__.items() if key not in before or before[key] is not value]

    def undo() -> None:
        for key in changed:
            if key in before:
                module.__dict__[key] = before[key]
            else:
                module.__dict__.pop(key, None)

    if getattr(module, name) is not function:
        undo()
        raise ValueError(f"{site.path or 'the root'} does not let {name} be replaced")
    return undo
