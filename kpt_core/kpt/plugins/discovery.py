"""Which plugins are installed, and which of them may be imported.

Nothing of a plugin is imported here: its name, its distribution and the core versions that it
declares are read from the metadata of the installed distributions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import importlib_metadata

from kpt.hookspecs import ENTRY_POINT_GROUP
from kpt.plugins.isolation import attempt
from kpt.plugins.stamps import is_editable
from kpt.plugins.status import (
    ALLOW_VARIABLE,
    DENY_VARIABLE,
    PluginStatus,
    disable_command,
    enable_command,
    install_command,
    names_in,
    normalised,
    one_line,
    upgrade_or_disable,
)

if TYPE_CHECKING:
    from importlib_metadata import Distribution, EntryPoint

CORE_DISTRIBUTION = "kpt-core"


@dataclass(frozen=True)
class Candidate:
    """One entry point of one installed distribution."""

    name: str
    distribution: str
    version: str
    requirements: tuple[str, ...]
    entry_point: EntryPoint
    editable: bool = False

    @property
    def rank(self) -> tuple[bool, str, str]:
        """The order of loading; the first of two equal names keeps it.

        A distribution called ``kpt-plugin-<name>`` comes before others that claim ``<name>``, so
        that a stranger's distribution cannot displace the one that the name stands for.
        """
        conventional = self.distribution == f"kpt-plugin-{normalised(self.name)}"
        return (not conventional, self.distribution, self.name)


def candidates() -> tuple[list[Candidate], list[PluginStatus]]:
    """The installed plugins in the order of loading, and statuses of unreadable distributions."""
    found: list[Candidate] = []
    faults: list[PluginStatus] = []
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions():
        # Reading one small text file of each distribution is several times cheaper than parsing
        # the metadata of all of them, and almost none of them is a plugin.
        text = attempt(distribution.read_text, "entry_points.txt").value
        if not text or ENTRY_POINT_GROUP not in text:
            continue
        outcome = attempt(_read, distribution, seen)
        if outcome.error is not None:
            label = str(getattr(distribution, "_path", "an unnamed distribution")).rpartition("/")[2]
            faults.append(
                PluginStatus(
                    name=label,
                    distribution=label,
                    state="broken",
                    reason=f"its metadata cannot be read ({one_line(outcome.error)})",
                    mend="pip check",
                )
            )
        found.extend(outcome.value or ())
    found.sort(key=lambda candidate: candidate.rank)
    return found, faults


def _read(distribution: Distribution, seen: set[str]) -> list[Candidate]:
    name = normalised(distribution.metadata["Name"])
    if name in seen:
        return []
    seen.add(name)
    # The first distribution of a name on the path is the one that Python imports; an older copy
    # behind it (an editable install, a second site folder) must not add its entry points.
    active = importlib_metadata.distribution(name)
    return [
        Candidate(
            name=entry_point.name,
            distribution=name,
            version=str(active.version),
            requirements=tuple(active.requires or ()),
            entry_point=entry_point,
            editable=is_editable(active),
        )
        for entry_point in active.entry_points.select(group=ENTRY_POINT_GROUP)
    ]


def requirements(distributions: Iterable[str]) -> dict[str, str]:
    """The installed version of each package that ``distributions`` require here.

    kpt's own packages are left out, what only an extra asks for, and what is not installed.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    found: dict[str, str] = {}
    for distribution in distributions:
        for text in attempt(importlib_metadata.requires, distribution).value or ():
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            name, marker = normalised(requirement.name), requirement.marker
            own = name in (CORE_DISTRIBUTION, "kernel-pytorch") or name.startswith("kpt-plugin-")
            if not own and name not in found and (marker is None or marker.evaluate({"extra": ""})):
                installed = attempt(importlib_metadata.version, name).value
                if installed is not None:
                    found[name] = str(installed)
    return found


def refusal(candidate: Candidate, selected: Iterable[str] | None) -> PluginStatus | None:
    """Why ``candidate`` must not be imported, or None when it may."""
    own = {normalised(candidate.name), candidate.distribution}
    name, distribution = candidate.name, candidate.distribution

    def status(state: str, reason: str, mend: str) -> PluginStatus:
        return PluginStatus(name, distribution, candidate.version, state, reason, mend)  # type: ignore[arg-type]

    denied = names_in(DENY_VARIABLE) or ()
    if own & {normalised(entry) for entry in denied}:
        return status("disabled", f"{DENY_VARIABLE} names it", enable_command(name, distribution))
    allowed = names_in(ALLOW_VARIABLE)
    if allowed is not None and not own & {normalised(entry) for entry in allowed}:
        reason = f"{ALLOW_VARIABLE} does not name it" if allowed else f"{ALLOW_VARIABLE} is empty"
        return status("disabled", reason, enable_command(name, distribution))
    if selected is not None and not own & {normalised(entry) for entry in selected}:
        return status("disabled", "it was not selected", f"add {name!r} to the selected plugins")
    return _incompatibility(candidate)


def _incompatibility(candidate: Candidate) -> PluginStatus | None:
    from packaging.requirements import InvalidRequirement, Requirement

    from kpt import __version__ as core_version

    name, distribution, version = candidate.name, candidate.distribution, candidate.version
    for text in candidate.requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return PluginStatus(
                name,
                distribution,
                version,
                "invalid",
                f"its metadata requires {text!r}, which is not a requirement",
                upgrade_or_disable(name, distribution),
            )
        if normalised(requirement.name) != CORE_DISTRIBUTION:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(core_version, prereleases=True):
            return PluginStatus(
                name,
                distribution,
                version,
                "incompatible",
                f"{distribution} {version} needs {CORE_DISTRIBUTION} {requirement.specifier}, "
                f"and {core_version} is installed",
                f"{install_command(f'{CORE_DISTRIBUTION}{requirement.specifier}')}"
                f"  # or: {disable_command(name)}",
            )
    return None
