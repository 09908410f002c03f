"""Stage 7: the record of a run, for people and for programs."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """One variant that was kept, rejected or not tried.

    ``gain`` is the measured ratio without / with this variant in the company of the others (for the
    whole plan's only step: untouched / optimised); None when nothing was timed. ``rule`` names what
    decided: a rule of the referee ("value", "gradient", …), "slower", "no-effect", "failed",
    "budget", "deadline", "fuel", or "kept".
    """

    name: str
    phase: str
    plugin: str
    rule: str
    reason: str
    gain: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "phase": self.phase,
            "plugin": self.plugin,
            "rule": self.rule,
            "reason": self.reason,
            "gain": self.gain,
            "figures": dict(self.figures),
        }


@dataclass
class Receipt:
    """What was tried, kept, rejected and why, with every number that decided.

    Times are in seconds. ``speedup`` is the median of the paired ratios untouched / optimised with
    its interval ``speedup_low`` to ``speedup_high``, which holds it with ``confidence`` (0.95; 0.99 where the
    clock had to look twice); 1.0 when the original came back. Where the examples
    are of several kinds (of other sizes or forms), it is the geometric mean of the kinds' medians, seconds
    are arithmetic means, and ``kinds`` has each with its label, share, ratio, interval and seconds.
    ``break_even_calls`` is set-up time over the time saved per call; None when nothing is saved.
    ``derived_bytes`` are those of the tensors that the plan holds beside the model's own: copies, packed
    weights, constants of compiled code. What native libraries allocate for themselves and the machine
    code are not in it. ``calls`` is filled by `kpt.report`: "optimized", "fallback", the "reasons" of
    fallbacks, and "misses", which are calls of single kernels and compiled blocks inside optimised calls
    that ran the original code of that part.
    """

    model: str
    mode: str
    level: str
    objective: str
    status: str = "original"
    reason: str = ""
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    accepted: list[Entry] = field(default_factory=list)
    rejected: list[Entry] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    sites: list[dict[str, Any]] = field(default_factory=list)
    left_alone: list[list[str]] = field(default_factory=list)
    patches: list[str] = field(default_factory=list)
    speedup: float = 1.0
    speedup_low: float = 1.0
    speedup_high: float = 1.0
    confidence: float = 0.95
    seconds_before: float = 0.0
    seconds_after: float = 0.0
    kinds: list[dict[str, Any]] = field(default_factory=list)
    setup_seconds: float = 0.0
    search_seconds: float = 0.0
    searched: bool = False
    recipe: str = "none"
    watched_tensors: int = 0
    derived_bytes: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    created: str = ""
    calls: dict[str, Any] = field(default_factory=dict)
    recipe_data: dict[str, Any] | None = None

    @property
    def optimized(self) -> bool:
        """Whether a plan is (or was, when this copy was taken) committed."""
        return self.status == "optimized"

    @property
    def break_even_calls(self) -> int | None:
        saved = self.seconds_before - self.seconds_after
        if not self.optimized or saved <= 0.0:
            return None
        return math.ceil((self.setup_seconds + self.search_seconds) / saved)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``to_json`` writes and trackers receive."""
        data = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        data["accepted"] = [entry.to_dict() for entry in self.accepted]
        data["rejected"] = [entry.to_dict() for entry in self.rejected]
        data["schema"] = SCHEMA
        data["optimized"] = self.optimized
        data["break_even_calls"] = self.break_even_calls
        return data

    def to_json(self, indent: int | None = 2) -> str:
        """The receipt as one JSON object; numbers that JSON lacks become null."""
        return json.dumps(_finite(self.to_dict()), indent=indent, sort_keys=True, default=str)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Receipt:
        """A receipt read back from `to_dict`'s data.

        Raises:
            ValueError: the data is of another schema version, or no receipt.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"receipt schema {found!r} is not {SCHEMA}; write it again with this version of kpt"
            )
        missing = [name for name in ("model", "mode", "level", "objective") if name not in data]
        if missing:
            what = "it is a recipe, which holds a plan only" if "steps" in data else "it is something else"
            raise ValueError(f"{what}; a receipt names {', '.join(missing)} as well")
        known = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        for key in ("accepted", "rejected"):
            known[key] = [Entry(**entry) for entry in known.get(key, [])]
        return cls(**known)

    # -- for people

    def headline(self) -> str:
        """The result in one sentence."""
        if self.optimized:
            interval = (
                f"{100 * self.confidence:.0f} % interval {self.speedup_low:.2f} to {self.speedup_high:.2f}"
            )
            interval += f" over {len(self.kinds)} kinds of calls" if self.kinds else ""
            if self.objective == "throughput" and self.seconds_before and self.seconds_after:
                before, after = _rate(self.seconds_before), _rate(self.seconds_after)
                return f"{self.model}: {self.speedup:.2f}x the throughput ({before} -> {after}, {interval})"
            before, after = _duration(self.seconds_before), _duration(self.seconds_after)
            return f"{self.model}: {self.speedup:.2f}x faster ({before} -> {after} per call, {interval})"
        return f"{self.model}: returned unoptimised - {self.reason or 'nothing paid for itself'}"

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        buffer = StringIO()
        Console(file=buffer, width=110, no_color=True, highlight=False).print(self)
        return buffer.getvalue().rstrip()

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        yield Text(self.headline(), style="bold green" if self.optimized else "bold yellow")
        yield Text(self._facts())
        # Names and reasons are plugins' and exceptions' own: rich would take their brackets for markup.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for column in ("variant", "phase", "plugin"):
            table.add_column(column)
        table.add_column("gain", justify="right")
        table.add_column("why", overflow="fold")
        for mark, style, entries in (("kept", "green", self.accepted), ("no", "red", self.rejected)):
            for alike, entry in _alike(entries):
                gain = "" if entry.gain is None else f"{entry.gain:.2f}x"
                why = entry.reason if entry.rule in ("kept",) else f"{entry.rule}: {entry.reason}"
                facts = ("\n".join(alike), entry.phase, entry.plugin, gain, why)
                table.add_row(Text(mark, style), *map(Text, facts))
        for skip in self.skipped:
            names = (skip["name"], skip["phase"], skip["plugin"], "")
            table.add_row(Text("skip", "dim"), *map(Text, names), Text(skip["reason"], "dim"))
        if table.row_count:
            yield table
        for line in (*self._kinds(), *self._calls(), *self.notes):
            yield Text(line)

    def _facts(self) -> str:
        parts = [f"{self.mode}, level {self.level}, objective {self.objective}{self._load()}"]
        if self.hardware.get("name"):
            parts.append(str(self.hardware.get("details", {}).get("model") or self.hardware["name"]))
        if self.baseline.get("reference_dtype"):
            parts.append(f"judged against {self.baseline['reference_dtype']}")
        spent = f"search {self.search_seconds:.1f} s" if self.searched else f"recipe {self.recipe}, no search"
        parts.append(f"{spent}, set-up {self.setup_seconds:.1f} s")
        if self.derived_bytes:
            parts.append(f"holds {_size(self.derived_bytes)} of copies made from weights")
        if self.break_even_calls is not None:
            parts.append(f"pays off after {self.break_even_calls} calls")
        return " | ".join(parts)

    def _load(self) -> str:
        callers, queued = self.baseline.get("callers", 1), self.baseline.get("queued", 1)
        if callers > 1:
            return f" ({callers} callers at once)"
        return f" ({queued} calls in a row)" if queued > 1 else ""

    def _kinds(self) -> list[str]:
        """A line for each kind of call, which says so where the plan makes it slower."""
        lines = []
        for kind in self.kinds:
            before, after = _duration(kind["baseline_seconds"]), _duration(kind["candidate_seconds"])
            slower = " - slower" if kind["high"] is not None and kind["high"] < 1.0 else ""
            lines.append(f"  {kind['label']}: {kind['ratio']:.2f}x ({before} -> {after}){slower}")
        return ["by kind of call:", *lines] if lines else []

    def _calls(self) -> list[str]:
        if not self.calls:
            return []
        lines = [f"calls since: {self.calls['optimized']} optimised, {self.calls['fallback']} original"]
        lines += [f"  {count} x {reason}" for reason, count in self.calls.get("reasons", {}).items()]
        misses = self.calls.get("misses", {})
        if misses:
            lines.append("parts of optimised calls that ran their original code:")
            lines += [f"  {count} x {part}" for part, count in misses.items()]
        return lines

    def to_html(self) -> str:
        """The receipt as an HTML fragment; every text is escaped."""
        rows = []
        for mark, entries in (("kept", self.accepted), ("rejected", self.rejected)):
            for names, entry in _alike(entries):
                gain = "" if entry.gain is None else f"{entry.gain:.2f}x"
                told = f"{entry.rule}: {entry.reason}"
                rows.append((mark, ", ".join(names), entry.phase, entry.plugin, gain, told))
        rows += [("skipped", s["name"], s["phase"], s["plugin"], "", s["reason"]) for s in self.skipped]
        head = "".join(f"<th>{h}</th>" for h in ("", "variant", "phase", "plugin", "gain", "why"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
        )
        lines = (self._facts(), *self._kinds(), *self._calls(), *self.notes)
        facts = "<br>".join(map(html.escape, lines))
        return (
            f"<div class='kpt-receipt'><p><b>{html.escape(self.headline())}</b></p><p>{facts}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    _repr_html_ = to_html


def _alike(entries: list[Entry]) -> list[tuple[list[str], Entry]]:
    """The entries that people are shown: what failed for one reason is one, with the names of all."""
    shown: dict[Any, tuple[list[str], Entry]] = {}
    for number, entry in enumerate(entries):
        key = (entry.phase, entry.plugin, entry.rule, entry.reason) if entry.rule == "failed" else number
        shown.setdefault(key, ([], entry))[0].append(entry.name)
    return list(shown.values())


def _duration(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _rate(seconds: float) -> str:
    return f"{1.0 / seconds:.{0 if seconds < 1e-2 else 1}f} calls/s"


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_finite(item) for item in value]
    return value
