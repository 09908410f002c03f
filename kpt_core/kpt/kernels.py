"""Which kernel serves which site: proposed for a plan, judged, frozen at commit, dispatched at run time.

Kernels at regions of a captured graph are in `kpt.graph_kernels`.

The kernels of one spec on all sites that it supports form one variant. In a workspace each site's
forward calls the kernel through a table: while the plan is judged the table learns what the site
sees (dtypes, strides, alignment, devices), at commit it is frozen, and from then on a call that is
not in it runs the original code and is counted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from kpt import plugins
from kpt.error_text import summary
from kpt.specs import LEVELS, KernelSpec, Undo, Variant

if TYPE_CHECKING:
    from kpt.ops.sites import Site
    from kpt.specs import HardwareProfile

_ALIGNMENT = 64
_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device)
_is_compiling = torch.compiler.is_compiling


class SiteTable:
    """What a site was seen with while it was judged; frozen, it refuses everything else."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: set[Any] = set()
        self.frozen = False
        self.calls = 0
        self._misses = itertools.count()

    def admits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        key = tuple(_signature(value) for value in (*args, *kwargs.values()))
        if not self.frozen:
            self.known.add(key)
        elif key not in self.known:
            next(self._misses)  # counted without a lock, from any thread
            return False
        self.calls += 1
        return True

    @property
    def misses(self) -> int:
        """Calls that the frozen table refused."""
        return int(self._misses.__reduce__()[1][0])


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        contiguous = value.is_contiguous()
        layout = True if contiguous else _stride_order(value)
        return (
            value.dtype,
            value.dim(),
            value.shape[-1:],
            layout,
            value.device,
            value.data_ptr() % _ALIGNMENT == 0,
            value.is_conj(),
            value.is_neg(),
        )
    if isinstance(value, _CONSTANTS):
        return type(value), value  # a flag or an axis that was not seen was not judged either
    return type(value)


def _stride_order(tensor: torch.Tensor) -> tuple[int, ...]:
    strides = tensor.stride()
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


@dataclass
class KernelBehaviour:
    """The `Pass` of one kernel on the sites that it supports."""

    spec: KernelSpec
    sites: tuple[Site, ...]
    tables: list[SiteTable] = field(default_factory=list)
    traced: bool = False
    #: The plugins in use, one of which may define the op.
    registry: Any = None
    #: Names of the sites that it leaves alone.
    left_out: list[str] = field(default_factory=list)

    def reference(self) -> Callable[..., Any]:
        """What the kernel has to compute, and what runs where it cannot."""
        from kpt import ops

        return ops.reference(self.spec.op, self.registry)

    def leave_out(self, kinds: set[str]) -> None:
        """Serve no site, and no further binding of one, that is of these kinds."""
        sites = [site for site in self.sites if kind_of(site) not in kinds]
        self.left_out = [site.name for site in self.sites if kind_of(site) in kinds]
        self.sites = tuple(
            replace(site, others=tuple(other for other in site.others if kind_of(other) not in kinds))
            for site in sites
        )

    def effect(self) -> str:
        """What it changed, for the receipt."""
        return f"right and faster{self._said_of_others()}"

    def _said_of_others(self) -> str:
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - 4} more" if len(self.left_out) > 4 else ""
        return f"; not judged in time, and left alone: {', '.join(self.left_out[:4])}{more}"

    def propose(self, observation: Any, hardware: Any) -> list[Variant]:
        paths = tuple(sorted({site.name for site in self.sites}))
        return [
            Variant(
                name=f"{self.spec.op}/{self.spec.name}",
                params={"sites": list(paths)},
                predicted_gain=predicted(self.spec, observation, hardware, self.sites),
                sites=paths,
                derives=self.spec.holds_weights,
                reproducible=self.spec.reproducible,
            )
        ]

    def apply(self, model: torch.nn.Module, variant: Variant) -> Undo:
        from kpt import ops

        self.tables = []
        self.traced = False
        undos: list[Undo] = []
        for site in self.sites:
            here = site.at(model)
            undos.append(ops.install(model, here, self._dispatched(here, callable_for(self.spec, here))))

        def undo() -> None:
            for step in reversed(undos):
                step()

        return undo

    def _dispatched(self, site: Site, kernel: Callable[..., Any]) -> Callable[..., Any]:
        table = SiteTable(site.name)
        self.tables.append(table)
        reference = self.reference()
        behaviour = self

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            if _is_compiling():
                behaviour.note_traced()
                return kernel(*args, **kwargs)
            if table.admits(args, kwargs):
                return kernel(*args, **kwargs)
            return reference(*args, **kwargs)

        return dispatch

    def note_traced(self) -> None:
        """Note that a site was compiled into a graph.

        Dynamo traces this. It must read nothing: what it reads becomes a condition of the compiled code,
        which would hold for the very first call only if the value is what is written here.
        """
        self.traced = True

    def freeze(self) -> None:
        for table in self.tables:
            table.frozen = True

    def misses(self) -> dict[str, int]:
        """Calls that ran the reference because the frozen table did not know them, by site."""
        return {table.name: table.misses for table in self.tables if table.misses}

    def verify_applied(self, model: torch.nn.Module) -> bool:
        return self.traced or any(table.calls for table in self.tables)


def kind_of(site: Site) -> str:
    """What ``site`` saw: kernels are judged once for all sites that saw the same."""
    return "; ".join(
        ", ".join(
            f"{name}: {shown.dtypes.get(name)} {list(shape)}" for name, shape in sorted(shown.shapes.items())
        )
        for shown in site.examples
    )


def callable_for(spec: KernelSpec, site: Site) -> Callable[..., Any]:
    """What serves ``site``: the kernel's entry, or what its ``setup`` makes for the site.

    Raises:
        PluginError: it cannot be loaded, or is nothing that can be called; the message names it.
    """
    if spec.setup is None:
        kernel: Callable[..., Any] = plugins.load(spec.entry)
        origin = f"The kernel's entry {spec.entry!r} is"
    else:
        kernel = plugins.load(spec.setup)(site)
        origin = f"The kernel's setup {spec.setup!r} returned"
    if not callable(kernel):
        raise plugins.PluginError(f"{origin} {kernel!r}; expected a function with the op's signature.")
    return kernel


def refusal_of(spec: KernelSpec, site: Site) -> str | None:
    """Why the kernel refuses ``site``; None where it takes it.

    Raises:
        PluginError: ``supports`` cannot be loaded, or returned something else than None or a reason.
    """
    found: str | None = plugins.load(spec.supports)(site) if spec.supports else None
    if found is not None and not isinstance(found, str):
        raise plugins.PluginError(
            f"The kernel's supports {spec.supports!r} returned {found!r}; expected None to accept the site, "
            "or the reason to refuse it."
        )
    return found


def propose(observation: Any, registry: Any, proposals: Any) -> list[Any]:
    """Add a candidate for every registered kernel that some recognised site can use.

    Returns the registered kernels that would fit but whose op no module or function computes.
    """
    siteless: list[Any] = []
    for registered in registry.specs("kpt_kernels"):
        spec: KernelSpec = registered.spec
        name = f"{spec.op}/{spec.name}"
        reason = _unfit(spec, observation)
        sites: list[Site] = []
        if reason is None:
            sites, reason = supported(spec, observation.sites, observation.mode)
            if not sites and reason is None:
                siteless.append(registered)
                continue
        if not sites:
            proposals.skip(name, registered.plugin, "kernels", reason or "")
            continue
        make = functools.partial(KernelBehaviour, spec, tuple(sites), registry=registry)
        for variant in variants_of(make(), observation, registered, proposals):
            proposals.offer(
                variant=variant,
                phase="kernels",
                kernel=True,
                plugin=registered.plugin,
                source=name,
                make=make,
                level=spec.level,
                dtypes=spec.dtypes,
                provides=frozenset({f"kernel:{spec.op}"}),
                priority=spec.priority,
            )
    return siteless


def predicted(spec: KernelSpec, observation: Any, hardware: Any, sites: tuple[Site, ...]) -> float:
    """The gain that the kernel's ``predict`` expects on these sites, or the spec's own figure.

    Raises:
        PluginError: ``predict`` cannot be loaded, or returned something else than a positive number.
    """
    if spec.predict is None:
        return spec.predicted_gain
    gain = plugins.load(spec.predict)(observation, hardware, sites)
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0.0 < gain < math.inf:
        raise plugins.PluginError(
            f"The kernel's predict {spec.predict!r} returned {gain!r}; expected a ratio of latencies above 0."
        )
    return float(gain)


def variants_of(
    behaviour: KernelBehaviour, observation: Any, registered: Any, proposals: Any
) -> list[Variant]:
    """What ``behaviour`` offers; an exception in the plugin's ``predict`` is a skip with that reason."""
    try:
        return behaviour.propose(observation, observation.hardware)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a stranger's `predict` may raise anything; it loses this kernel only
        raised = f"predict raised {summary(error)}"
        reason = error.message if isinstance(error, plugins.PluginError) else raised
        proposals.skip(f"{behaviour.spec.op}/{behaviour.spec.name}", registered.plugin, "kernels", reason)
        return []


def _unfit(spec: KernelSpec, observation: Any) -> str | None:
    if LEVELS.index(spec.level) > LEVELS.index(observation.level):
        return f"needs level={spec.level!r}"
    if not _is_for(spec, observation.hardware, observation.device_type):
        return f"needs {' or '.join(spec.hardware)}; this is {observation.hardware.name}"
    if observation.training and not spec.backward:
        return "has no backward"
    return None


def _is_for(spec: KernelSpec, hardware: HardwareProfile, device_type: str) -> bool:
    return not spec.hardware or bool({hardware.name, device_type} & set(spec.hardware))


def ops_with_kernels(registry: Any, hardware: HardwareProfile, device_type: str) -> frozenset[str]:
    """The ops that some plugin offers a kernel of for this hardware: their sites are worth a proof first."""
    specs = (registered.spec for registered in registry.specs("kpt_kernels"))
    return frozenset(spec.op for spec in specs if _is_for(spec, hardware, device_type))


def supported(spec: KernelSpec, candidates: Iterable[Site], mode: str) -> tuple[list[Site], str | None]:
    """The sites of the spec's op that it supports, and the last reason for those that it does not."""
    reason: str | None = None
    sites: list[Site] = []
    try:
        for site in candidates:
            if site.op != spec.op:
                continue
            if mode not in site.modes:
                reason = f"{site.name} is proved for {', '.join(site.modes)} only"
                continue
            if spec.dtypes and not set(site.dtypes) & set(spec.dtypes):
                reason = (
                    f"{site.name} computes in {', '.join(site.dtypes)}; supported: {', '.join(spec.dtypes)}"
                )
                continue
            refusal = refusal_of(spec, site)
            if refusal is not None:
                reason = f"{site.name}: {refusal}"
                continue
            # A kernel made for a site is made for what the site's own binding passes to it.
            others = () if spec.setup else tuple(supported(spec, site.others, mode)[0])
            sites.append(replace(site, others=others) if site.others else site)
    except KeyboardInterrupt:
        raise
    except plugins.PluginError as error:
        return [], error.message
    except BaseException as error:  # noqa: BLE001 - a stranger's `supports` may raise anything; it loses this kernel only
        return [], f"supports raised {summary(error)}"
    return _outermost(sites), reason


def _outermost(sites: list[Site]) -> list[Site]:
    """Without modules inside another site's module: what replaces that one's forward never calls them."""
    whole = {site.path for site in sites if site.kind == "module"}
    return [s for s in sites if s.kind == "graph" or not any(above in whole for above in _above(s.path))]


def _above(path: str) -> Iterator[str]:
    """The paths of the modules around the one at ``path``."""
    while path:
        path = path.rpartition(".")[0]
        yield path
