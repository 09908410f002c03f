"""The op catalogue: what each op computes, and where a model computes it, by proof.

``recognise(model, calls)`` returns sites; ``Site.run(kernel, ...)`` serves a site's call with a
kernel; ``install(root, site, kernel)`` puts a kernel into a copy of the model; ``reference(op)`` is
what a kernel has to equal.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpt.ops.binding import Binding, Hypothesis, SiteMismatch
    from kpt.ops.graph import recognise_graph
    from kpt.ops.index import catalogue, reference
    from kpt.ops.installation import install
    from kpt.ops.rebind import bind_function
    from kpt.ops.recognition import Recognition, forget_proofs, recognise
    from kpt.ops.sites import Example, Site
    from kpt.ops.substitution import graph_sites, substitute

_HOMES = {
    "Binding": "kpt.ops.binding",
    "Example": "kpt.ops.sites",
    "Hypothesis": "kpt.ops.binding",
    "Recognition": "kpt.ops.recognition",
    "Site": "kpt.ops.sites",
    "SiteMismatch": "kpt.ops.binding",
    "bind_function": "kpt.ops.rebind",
    "catalogue": "kpt.ops.index",
    "forget_proofs": "kpt.ops.recognition",
    "graph_sites": "kpt.ops.substitution",
    "install": "kpt.ops.installation",
    "recognise": "kpt.ops.recognition",
    "recognise_graph": "kpt.ops.graph",
    "reference": "kpt.ops.index",
    "substitute": "kpt.ops.substitution",
}

__all__ = [
    "Binding",
    "Example",
    "Hypothesis",
    "Recognition",
    "Site",
    "SiteMismatch",
    "bind_function",
    "catalogue",
    "forget_proofs",
    "graph_sites",
    "install",
    "recognise",
    "recognise_graph",
    "reference",
    "substitute",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module 'kpt.ops' has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
