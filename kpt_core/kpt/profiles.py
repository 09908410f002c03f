"""Hardware profiles: which devices there are, and how fast they were measured to be."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt import user_cache
from kpt.plugins import PluginError, PluginStatus, Registry, instantiate
from kpt.plugins import registry as installed_plugins
from kpt.plugins.isolation import attempt, foreign
from kpt.plugins.status import disable_command, one_line, upgrade_or_disable
from kpt.specs import HardwareProfile

if TYPE_CHECKING:
    from kpt.plugins import Registered
    from kpt.specs import HardwareSpec

OVERRIDE_VARIABLE = "KPT_OVERRIDE_HARDWARE"
_SCHEMA = 6

_log = logging.getLogger("kpt")
_lock = threading.RLock()
_measured: dict[str, HardwareProfile] = {}


@dataclass(frozen=True)
class Detection:
    """What one probe said: a profile, or the reason why there is none."""

    registered: Registered[HardwareSpec]
    profile: HardwareProfile | None = None
    reason: str = ""
    broken: bool = False


def hardware(
    device: Any = None, *, measure: bool = True, registry: Registry | None = None
) -> HardwareProfile:
    """The profile of ``device``, or of the best device that a plugin finds.

    ``device`` is a device or its name (``"cpu"``, ``"cuda:0"``). Rates are measured once for a
    machine and kept in the user's cache folder; ``measure=False`` leaves out those that are not
    known yet. Where no plugin knows the device, the profile holds what Python itself can tell and
    its name begins with "unknown". ``KPT_OVERRIDE_HARDWARE`` replaces the profile by a recorded
    one, given as a JSON file or as a name that a plugin ships.

    Raises `PluginError` where a plugin knows the kind of device and says that there is none.
    """
    kind = _device_type(device)
    plugins = installed_plugins() if registry is None else registry
    chosen = os.environ.get(OVERRIDE_VARIABLE)
    if chosen:
        recorded = _override(chosen, plugins)
        if kind is None or recorded.device_type == kind:
            return recorded
    detections = [
        found for found in detect(plugins) if kind is None or found.registered.spec.device_type == kind
    ]
    detections.sort(key=lambda found: -found.registered.spec.priority)
    present = next((found for found in detections if found.profile is not None), None)
    if present is None:
        absent = next((found for found in detections if not found.broken), None)
        if kind is not None and absent is not None and not _usable(kind):
            raise PluginError(
                f"There is no {kind!r} device: {absent.reason} (says {absent.registered.owner}).",
                "kpt doctor",
            )
        return _unknown(kind or "cpu", detections)
    assert present.profile is not None
    return _with_rates(present.registered, present.profile, measure)


def detect(registry: Registry | None = None) -> tuple[Detection, ...]:
    """Ask every probe, each in isolation; no device is initialised."""
    plugins = installed_plugins() if registry is None else registry
    return tuple(_ask(registered) for registered in plugins.specs("kpt_hardware"))


def statuses(registry: Registry | None = None) -> tuple[PluginStatus, ...]:
    """The plugins' statuses, with those marked whose hardware is absent or whose probe fails."""
    plugins = installed_plugins() if registry is None else registry
    detections = detect(plugins)
    return tuple(_with_hardware(status, detections) for status in plugins.statuses)


def to_dict(profile: HardwareProfile) -> dict[str, Any]:
    """``profile`` as plain JSON values."""
    plain = {entry.name: getattr(profile, entry.name) for entry in fields(profile)}
    return json.loads(json.dumps({key: _plain(value) for key, value in plain.items()}))


def from_dict(values: Any) -> HardwareProfile:
    """The profile that `to_dict` wrote; raises `ValueError` naming the field that is wrong."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a profile is an object, not {type(values).__name__}")
    blank = asdict(HardwareProfile(name="", device_type=""))
    unknown = set(values) - set(blank)
    if unknown:
        raise ValueError(f"unknown fields {', '.join(sorted(unknown))}; known are {', '.join(blank)}")
    for name in ("name", "device_type"):
        if not values.get(name):
            raise ValueError(f"the field {name} is missing")
    return HardwareProfile(**{name: _field(name, blank[name], value) for name, value in values.items()})


def _field(name: str, example: Any, value: Any) -> Any:
    """``value`` as the type of ``example``; numbers are finite and not negative."""
    wrong = ValueError(f"the field {name} is {value!r}")
    if name == "triton_target":
        if value is None or isinstance(value, str):
            return value
    elif isinstance(example, str):
        if isinstance(value, str):
            return value
    elif isinstance(example, tuple):
        if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
    elif isinstance(example, dict):
        number = name in ("matmul_rates", "caches")
        if isinstance(value, Mapping) and (not number or all(map(_is_rate, value.values()))):
            return dict(value)
    elif _is_rate(value):
        return type(example)(value)
    raise wrong


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _device_type(device: Any) -> str | None:
    if device is None:
        return None
    name = str(device)
    torch = sys.modules.get("torch")
    if torch is not None:
        outcome = attempt(torch.device, name)
        if outcome.error is not None:
            raise PluginError(f"{name!r} is not a device: {one_line(outcome.error)}.")
    kind = name.partition(":")[0].strip()
    if not kind.isidentifier():
        raise PluginError(f"{name!r} is not a device; write a type such as 'cpu' or 'cuda:0'.")
    return kind


def _usable(kind: str) -> bool:
    """Whether torch itself can use such a device: one that no plugin describes is unknown, not absent."""
    backend = getattr(sys.modules.get("torch"), kind, None)
    return bool(attempt(lambda: backend is not None and backend.is_available()).value)


def _ask(registered: Registered[HardwareSpec]) -> Detection:
    with foreign(registered.owner, "looked for its device", disable_command(registered.plugin)):
        outcome = attempt(lambda: instantiate(registered.spec.probe).detect())
    if outcome.error is not None:
        return Detection(registered, reason=f"its probe raised {one_line(outcome.error)}", broken=True)
    answer = outcome.value
    if isinstance(answer, HardwareProfile):
        fault = _fault(answer, registered.spec.device_type)
        if fault:
            return Detection(registered, reason=f"its probe returned a profile: {fault}", broken=True)
        return Detection(registered, profile=answer)
    if isinstance(answer, str):
        return Detection(registered, reason=answer)
    reason = f"its probe returned {type(answer).__name__}; expected a HardwareProfile or a reason"
    return Detection(registered, reason=reason, broken=True)


def _fault(profile: HardwareProfile, device_type: str) -> str:
    """What is wrong with a profile that a plugin made, or nothing: everybody else computes with it."""
    checked = attempt(lambda: from_dict(to_dict(profile)))
    if checked.error is not None:
        return str(checked.error)
    if profile.device_type != device_type:
        return f"it is of a {profile.device_type} device; its spec says {device_type}"
    return ""


def _with_hardware(status: PluginStatus, detections: tuple[Detection, ...]) -> PluginStatus:
    own = [
        found
        for found in detections
        if (found.registered.plugin, found.registered.distribution) == (status.name, status.distribution)
    ]
    if status.state != "ok" or not own:
        return status
    broken = next((found for found in own if found.broken), None)
    if broken is not None:
        mend = upgrade_or_disable(status.name, status.distribution)
        return replace(status, state="broken", reason=f"kpt_hardware: {broken.reason}", mend=mend)
    if any(found.profile is not None for found in own):
        return status
    return replace(status, state="hardware-absent", reason=own[0].reason, mend=disable_command(status.name))


def _unknown(kind: str, detections: list[Detection]) -> HardwareProfile:
    """What the standard library can tell: nothing is guessed, so rates and dtypes stay empty."""
    failures = "; ".join(f"{found.registered.owner}: {found.reason}" for found in detections)
    reason = failures or f"no plugin in use detects {kind!r} devices"
    if kind != "cpu":
        return HardwareProfile(name=f"unknown {kind} device", device_type=kind, details={"reason": reason})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    memory = attempt(lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")).value or 0
    return HardwareProfile(
        name=f"unknown {platform.machine()} processor",
        device_type="cpu",
        architecture=platform.machine(),
        compute_units=cores,
        memory_bytes=memory,
        details={"reason": reason},
    )


def _with_rates(
    registered: Registered[HardwareSpec], profile: HardwareProfile, measure: bool
) -> HardwareProfile:
    key = _key(registered, profile)
    with _lock:
        if key in _measured:
            return _measured[key]
        known = _recall(key)
        if known is None and not measure:
            return profile
        if known is None:
            outcome = attempt(_measure, registered, profile)
            if outcome.error is not None or outcome.value is None:
                reason = one_line(outcome.error or TypeError("no profile"))
                _log.warning("%s could not measure its device: %s", registered.owner, reason)
                return replace(profile, details={**profile.details, "unmeasured": reason})
            known = outcome.value
            if not _busy():  # rates that neighbours slowed down serve this process only
                _remember(key, known)
        _measured[key] = known
        return known


def _measure(registered: Registered[HardwareSpec], profile: HardwareProfile) -> HardwareProfile:
    with foreign(registered.owner, "measured its device", disable_command(registered.plugin)):
        answer = instantiate(registered.spec.probe).measure(profile)
    if not isinstance(answer, HardwareProfile):
        raise TypeError(f"measure returned {type(answer).__name__}; expected a HardwareProfile")
    fault = _fault(answer, profile.device_type)
    if fault:
        raise ValueError(f"measure returned a profile: {fault}")
    return answer


def _busy() -> bool:
    """Whether other work takes a good part of the processors just now, as far as the system tells."""
    if not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1) + 0.5


def _key(registered: Registered[HardwareSpec], profile: HardwareProfile) -> str:
    """What measured rates depend on: the device, who measures and by which libraries, and the processors."""
    facts = {
        "schema": _SCHEMA,
        "profile": to_dict(profile),
        "probe": registered.spec.probe,
        "plugin": [registered.distribution, registered.version],
        "torch": attempt(version, "torch").value,
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _recall(key: str) -> HardwareProfile | None:
    try:
        stored = user_cache.read_json(user_cache.folder("hardware") / f"{key}.json")
        return None if stored is None else from_dict(stored)
    except (user_cache.CacheError, ValueError) as error:
        _log.warning("Measured rates are not taken from the cache: %s", error)
        return None


def _remember(key: str, profile: HardwareProfile) -> None:
    try:
        user_cache.write_json(user_cache.folder("hardware") / f"{key}.json", to_dict(profile))
    except (user_cache.CacheError, OSError) as error:
        _log.warning("Measured rates are not kept: %s", error)


def _override(chosen: str, plugins: Registry) -> HardwareProfile:
    path = Path(chosen)
    if not path.is_file():
        shipped = dict(_shipped(plugins))
        if chosen not in shipped:
            known = ", ".join(sorted(shipped)) or "none (no plugin in use ships recorded profiles)"
            raise PluginError(
                f"{OVERRIDE_VARIABLE}={chosen!r} is neither a file nor a recorded profile; "
                f"known are {known}.",
                f"unset {OVERRIDE_VARIABLE}",
            )
        path = shipped[chosen]
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PluginError(
            f"{OVERRIDE_VARIABLE}: {path} is not a hardware profile: {error}.", f"unset {OVERRIDE_VARIABLE}"
        ) from error


def _shipped(plugins: Registry) -> Iterator[tuple[str, Path]]:
    """The recorded profiles: ``profiles/<name>.json`` in the package of a plugin's probe."""
    for registered in plugins.specs("kpt_hardware"):
        package = registered.spec.probe.partition(":")[0].partition(".")[0]
        spec = attempt(find_spec, package).value
        for location in (spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(Path(location, "profiles").glob("*.json")):
                yield path.stem, path
