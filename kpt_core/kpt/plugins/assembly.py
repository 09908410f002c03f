"""From installed distributions and inline objects to one registry."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kpt.plugins.isolation import attempt, foreign
from kpt.plugins.registered import Registered, Registry
from kpt.plugins.stamps import stamp
from kpt.plugins.status import (
    ALLOW_VARIABLE,
    DENY_VARIABLE,
    PluginError,
    PluginStatus,
    disable_command,
    install_command,
    names_in,
    normalised,
    one_line,
    upgrade_or_disable,
)

_lock = threading.RLock()
_building = threading.local()
_registries: dict[Any, Registry] = {}
_imported: dict[Any, _Plugin] = {}


@dataclass(frozen=True)
class _Plugin:
    """A plugin after its hooks were called: its status and the specs by hook."""

    status: PluginStatus
    specs: dict[str, list[Any]] = field(default_factory=dict)


def registry(selection: Sequence[str | object] | None = None, *, strict: bool = True) -> Registry:
    """The specs of the selected plugins; None selects all that are installed.

    ``selection`` holds names of installed plugins (or of their distributions) and plugin objects.
    The environment filters installed plugins in every case: ``KPT_PLUGINS`` lists those that may
    be loaded (empty: none), ``KPT_DISABLE_PLUGINS`` those that may not. What is not selected is
    never imported. The result is cached for a selection of names and an environment.

    Raises `PluginError` where something was asked for and nothing of it works, unless ``strict``
    is off. A plugin of which only one hook fails keeps the others; its status says so.
    """
    if isinstance(selection, str):
        raise PluginError(f"The selection is the string {selection!r}; write [{selection!r}].")
    if getattr(_building, "active", False):
        raise PluginError("A plugin asked for the registry while plugins are being loaded; do it on use.")
    key = _key(selection)
    with _lock:
        found = _registries.get(key) if key is not None else None
        if found is None:
            _building.active = True
            try:
                found = _build(selection)
            finally:
                _building.active = False
            if key is not None:
                _registries[key] = found
    if strict and selection is not None:
        _demand(selection, found)
    return found


def clear_cache() -> None:
    """Forget what was discovered, so that plugins installed since are found."""
    with _lock:
        _registries.clear()
        _imported.clear()


def _key(selection: Sequence[str | object] | None) -> Any:
    names = None if selection is None else tuple(selection)
    if names is not None and not all(isinstance(name, str) for name in names):
        return None  # an object may change between calls
    environment = (os.environ.get(ALLOW_VARIABLE), os.environ.get(DENY_VARIABLE))
    return (names, environment, tuple(sys.path))


def _build(selection: Sequence[str | object] | None) -> Registry:
    from kpt.plugins.discovery import candidates, refusal

    selected = None if selection is None else [entry for entry in selection if isinstance(entry, str)]
    installed, statuses = candidates()
    plugins: list[_Plugin] = []
    names: dict[str, PluginStatus] = {}
    for candidate in installed:
        refused = refusal(candidate, selected)
        if refused is not None:
            statuses.append(refused)
            continue
        status = PluginStatus(candidate.name, candidate.distribution, candidate.version)
        first = names.setdefault(normalised(candidate.name), status)
        if first is not status:
            statuses.append(_name_conflict(status, first))
            continue
        cached = (candidate.name, candidate.distribution, candidate.version, candidate.entry_point.value)
        if cached not in _imported:
            owner = f"{status.name} ({status.distribution} {status.version})"
            with foreign(owner, "was loaded", disable_command(status.name)):
                _imported[cached] = _import(status, candidate.entry_point.load)
        plugins.append(_imported[cached])
    plugins.extend(_inline(selection or ()))
    plugins = _without_conflicts(plugins)
    statuses.extend(plugin.status for plugin in plugins)
    statuses.extend(_missing(statuses))
    statuses.sort(key=lambda status: (not status.distribution, status.name, status.distribution))
    specs: dict[str, list[Registered[Any]]] = {}
    for plugin in plugins:
        status = plugin.status
        for hook, found in plugin.specs.items():
            specs.setdefault(hook, []).extend(
                Registered(spec, status.name, status.distribution, status.version) for spec in found
            )
    editable = {candidate.name for candidate in installed if candidate.editable}
    stamps = {
        plugin.status.name: stamp(spec for found in plugin.specs.values() for spec in found)
        for plugin in plugins
        if plugin.status.name in editable or not plugin.status.distribution
    }
    return Registry(statuses, specs, stamps)


def _inline(selection: Iterable[str | object]) -> Iterable[_Plugin]:
    seen: list[object] = []
    names: dict[str, int] = {}
    for plugin in selection:
        if isinstance(plugin, str) or any(plugin is other for other in seen):
            continue
        seen.append(plugin)
        own = attempt(lambda plugin=plugin: str(plugin.__name__)).value
        name = own or type(plugin).__name__
        names[name] = names.get(name, 0) + 1
        label = f"inline:{name}" if names[name] == 1 else f"inline:{name}-{names[name]}"
        with foreign(label, "was asked what it offers", upgrade_or_disable(label, "")):
            loaded = examine(plugin, PluginStatus(label))
        yield replace(loaded, status=replace(loaded.status, version="inline"))


def _import(status: PluginStatus, entry: Callable[[], object]) -> _Plugin:
    outcome = attempt(entry)
    if outcome.error is None:
        return examine(outcome.value, status)
    error = outcome.error
    # A missing module or shared library is an installation that is not whole; anything else is a
    # fault in the plugin's code, which reinstalling the same version cannot mend.
    mend = (
        install_command(status.distribution, "--force-reinstall")
        if isinstance(error, (ImportError, OSError))
        else upgrade_or_disable(status.name, status.distribution)
    )
    reason = f"it cannot be imported: {one_line(error)}"
    return _Plugin(replace(status, state="broken", reason=reason, mend=mend))


def examine(plugin: object, status: PluginStatus) -> _Plugin:
    """Validate ``plugin`` and call each of its hook implementations by itself."""
    from kpt.plugins.validation import Invalid, collected, hook_implementations

    mend = upgrade_or_disable(status.name, status.distribution)
    outcome = attempt(hook_implementations, plugin)
    if outcome.error is not None:
        reason = str(outcome.error) if isinstance(outcome.error, Invalid) else one_line(outcome.error)
        return _Plugin(replace(status, state="invalid", reason=reason, mend=mend))
    specs: dict[str, list[Any]] = {}
    working: list[str] = []
    for hook, implementations in (outcome.value or {}).items():
        for implementation in implementations:
            found = attempt(lambda hook=hook, call=implementation: collected(hook, call()))
            if found.error is None:
                specs.setdefault(hook, []).extend(found.value or ())
                working.append(hook)
                continue
            wrong = isinstance(found.error, Invalid)
            reason = str(found.error) if wrong else f"{hook} raised {one_line(found.error)}"
            # The first fault is the one to mend first; a raise outranks nothing, so keep the order.
            if status.state == "ok":
                status = replace(status, state="invalid" if wrong else "broken", reason=reason, mend=mend)
    return _Plugin(replace(status, hooks=tuple(dict.fromkeys(working))), specs)


def _name_conflict(status: PluginStatus, first: PluginStatus) -> PluginStatus:
    reason = (
        f"{status.distribution} and {first.distribution} both offer a plugin called {status.name!r}; "
        f"the one of {first.distribution} is in use"
    )
    return replace(status, state="conflict", reason=reason, mend=f"pip uninstall {status.distribution}")


def _without_conflicts(plugins: list[_Plugin]) -> list[_Plugin]:
    """Drop what clashes with an earlier plugin; that one is never touched by a later one."""
    from kpt.plugins.validation import CORE_OPS, cycle

    owners: dict[tuple[str, ...], str] = {("kpt_ops", name): "kpt-core" for name in CORE_OPS}
    passes: list[Any] = []
    kept: list[_Plugin] = []
    for plugin in plugins:
        status = plugin.status
        label = status.distribution or status.name
        specs: dict[str, list[Any]] = {}
        for hook, found in plugin.specs.items():
            specs[hook] = []
            for spec in found:
                identity = _identity(hook, spec)
                owner = owners.setdefault(identity, label)
                if owner == label and not any(_identity(hook, other) == identity for other in specs[hook]):
                    specs[hook].append(spec)
                    continue
                status = _worse(
                    status,
                    "conflict",
                    f"{type(spec).__name__} {spec.name!r} is offered by both {owner} and {label}; "
                    f"the first is in use",
                )
            if hook == "kpt_passes":
                waiting = cycle([*passes, *specs[hook]])
                if waiting:
                    status = _worse(status, "invalid", f"passes require each other: {' → '.join(waiting)}")
                    specs[hook] = [spec for spec in specs[hook] if spec.name not in waiting]
                    # A second cycle may hide behind the first; then nothing of this hook is sound.
                    if cycle([*passes, *specs[hook]]):
                        specs[hook] = []
                passes.extend(specs[hook])
        hooks = tuple(hook for hook in status.hooks if specs.get(hook) or not plugin.specs.get(hook))
        kept.append(_Plugin(replace(status, hooks=hooks), specs))
    return kept


def _identity(hook: str, spec: Any) -> tuple[str, ...]:
    """What has to be unique: passes and policies share the names that recipes use."""
    if hook == "kpt_kernels":
        return (hook, spec.op, spec.name)
    return ("kpt_passes" if hook == "kpt_precision_policies" else hook, spec.name)


def _worse(status: PluginStatus, state: str, reason: str) -> PluginStatus:
    if status.state != "ok":
        return status
    mend = upgrade_or_disable(status.name, status.distribution)
    return replace(status, state=state, reason=reason, mend=mend)  # type: ignore[arg-type]


def _missing(statuses: Iterable[PluginStatus]) -> list[PluginStatus]:
    """A status for each name in the allow-list that nothing installed answers to."""
    known = {normalised(name) for status in statuses for name in (status.name, status.distribution)}
    return [
        PluginStatus(
            name,
            state="broken",
            reason=f"{ALLOW_VARIABLE} names it, and no installed distribution offers it",
            mend="kpt plugins list",
        )
        for name in names_in(ALLOW_VARIABLE) or ()
        if normalised(name) not in known
    ]


def _demand(selection: Sequence[str | object], found: Registry) -> None:
    from kpt.plugins.validation import nearest

    for name in selection:
        if not isinstance(name, str):
            continue
        own = normalised(name)
        matching = [s for s in found.statuses if own in (normalised(s.name), normalised(s.distribution))]
        if not matching or not any(status.distribution for status in matching):
            offered = [status.name for status in found.statuses if status.distribution]
            known = nearest(name, offered) if offered else "no plugin is installed"
            raise PluginError(f"No installed plugin is called {name!r}; {known}.", "kpt plugins list")
        if not any(status.hooks for status in matching):
            status = matching[0]
            raise PluginError(
                f"The plugin {name!r} was asked for and is {status.state}: {status.reason}.", status.mend
            )
    for status in found.statuses:
        if not status.distribution and status.name.startswith("inline:") and not status.hooks:
            raise PluginError(f"The plugin {status.name!r} is {status.state}: {status.reason}.", status.mend)
