"""Discovery, status and isolation of plugins.

>>> from kpt.plugins import registry
>>> for found in registry().specs("kpt_passes"):
...     print(found.spec.name, "from", found.plugin)  # doctest: +SKIP
"""

from __future__ import annotations

from kpt.plugins.assembly import clear_cache, registry
from kpt.plugins.isolation import instantiate, load
from kpt.plugins.registered import Registered, Registry
from kpt.plugins.status import STATES, PluginError, PluginStatus

__all__ = [
    "STATES",
    "PluginError",
    "PluginStatus",
    "Registered",
    "Registry",
    "clear_cache",
    "instantiate",
    "load",
    "registry",
]
