"""KernelPyTorch: make a PyTorch model faster, prove that it is still right, undo what does not pay.

The public names are loaded when they are first used, so that ``import kpt`` imports neither torch
nor any plugin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt.artifact import load, save
    from kpt.hookspecs import hookimpl
    from kpt.profiles import hardware
    from kpt.transaction.accuracy import Accuracy
    from kpt.transaction.api import optimize, refresh, report, restore
    from kpt.transaction.receipt import Receipt

__version__ = "0.1.0"

_HOMES = {
    "optimize": "kpt.transaction.api",
    "report": "kpt.transaction.api",
    "restore": "kpt.transaction.api",
    "refresh": "kpt.transaction.api",
    "Accuracy": "kpt.transaction.accuracy",
    "Receipt": "kpt.transaction.receipt",
    "save": "kpt.artifact",
    "load": "kpt.artifact",
    "hardware": "kpt.profiles",
    "hookimpl": "kpt.hookspecs",
}

__all__ = [
    "Accuracy",
    "Receipt",
    "__version__",
    "hardware",
    "hookimpl",
    "load",
    "optimize",
    "refresh",
    "report",
    "restore",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module 'kpt' has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
