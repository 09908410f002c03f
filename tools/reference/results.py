"""docs/benchmarks.md and the figures in README.md, from benchmarks/results/*.json and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reference.markdown import table

LEVELS = ("exact", "production", "aggressive")
NOTHING_YET = "No result file has been committed yet; `make bench` writes them to `benchmarks/results/`."


def latest(folder: Path, benchmark: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest result file of ``benchmark`` and its content."""
    files = sorted(folder.glob(f"{benchmark}-[0-9]*.json"))
    return (files[-1], json.loads(files[-1].read_text(encoding="utf-8"))) if files else None


def by_machine(folder: Path, benchmark: str) -> list[tuple[Path, dict[str, Any]]]:
    """The newest result file of ``benchmark`` on each machine: the most complete first, then the newest."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"{benchmark}-[0-9]*.json"), reverse=True):
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = content["machine"]
        key = json.dumps([machine[part] for part in ("processor", "cores", "threads", "instructions")])
        found.setdefault(key, (path, content))

    def extent(each: tuple[Path, dict[str, Any]]) -> tuple[int, str]:
        content = each[1]
        return len(content.get("models", content.get("parts", ()))), content["date"]

    return sorted(found.values(), key=extent, reverse=True)


def origin(path: Path, content: dict[str, Any]) -> str:
    """Where the figures come from: machine, versions, date, file."""
    machine, versions = content["machine"], content["versions"]
    seen = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']:g} GiB, {', '.join(machine['instructions'])}. Versions: {seen}. "
        f"Measured on {content['date']}; file `benchmarks/results/{path.name}`."
    )


def interval(row: dict[str, Any]) -> str:
    return f"{row['median']:.2f}× ({row['low']:.2f}–{row['high']:.2f})"


def page(folder: Path) -> str:
    """The whole page of figures."""
    parts = [
        "# Benchmarks",
        "Every figure on this page is printed from a result file that a script in `benchmarks/` wrote. "
        "Ratios are against the untouched model in fp32 (eager), as the median of paired runs with its 95 % "
        "bootstrap interval. All contenders of a model take turns in one process, with fresh inputs for each "
        "call; a contender that could not be set up stays in the table. Errors are relative to fp64. "
        "Run `make bench` for the figures of your own machine.",
    ]
    machines, families = by_machine(folder, "cpu_models"), latest(folder, "families")
    for models in machines:
        parts += [f"## {titled('Six models on the CPU', models[1], machines)}", origin(*models)]
        for record in models[1]["models"].values():
            parts += model_section(record)
    if families:
        parts += ["## Small models of many families", origin(*families), *family_section(families[1])]
    trained = by_machine(folder, "cpu_training")
    for models in trained:
        parts += [f"## {titled('Training steps on the CPU', models[1], trained)}", origin(*models)]
        parts.append(
            "Forward, loss and backward, without dropout. The error is that of all gradients together, "
            "relative to those in fp64."
        )
        for record in models[1]["models"].values():
            parts += model_section(record)
    costs = by_machine(folder, "overhead")
    for cost in costs:
        parts += [f"## {titled('What kpt itself costs', cost[1], costs)}", origin(*cost)]
        parts += overhead_section(cost[1])
    if not machines and not families:
        parts.append(NOTHING_YET)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def titled(title: str, content: dict[str, Any], machines: list[Any]) -> str:
    """The title of a section; with the machine and the day where there are several."""
    if len(machines) < 2:
        return title
    return f"{title}: {content['machine']['processor']}, {content['date']}"


def model_section(record: dict[str, Any]) -> list[str]:
    parts = [f"### {record['title']}"]
    if "failed" in record:
        return [*parts, f"Not measured: {record['failed']}"]
    rows = []
    for name, row in sorted(record["contenders"].items(), key=lambda item: -speed(item[1])):
        shown = f"**{name}**" if name.startswith("kpt") else name
        if row["status"] == "ok":
            rows.append(
                [
                    shown,
                    interval(row["ratio"]),
                    f"{row['milliseconds']:.3g}",
                    f"{row['relative_error']:.1e}",
                    f"{row['setup_seconds']:.1f}",
                    " + ".join(row.get("accepted", [])),
                ]
            )
        else:
            rows.append([shown, row["status"], "", "", "", row["reason"]])
    header = ["contender", "ratio to eager", "ms", "error", "set-up, s", "accepted, or why not"]
    if "commit" in record:
        how = record.get("settings")
        times = f"; {how['budget']:g} s to optimise, {how['seconds']:g} s of calls" if how else ""
        parts.append(f"Commit {record['commit']}{times}.")
    parts.append(table(header, rows))
    verdicts = {"ahead": "is ahead of", "level": "is level with", "behind": "is behind"}
    for level, row in record["standing"].items():
        parts.append(
            f"- {level}: kpt {verdicts[row['verdict']]} the best peer that this level permits, "
            f"{row['best_peer']}: {interval(row['kpt_times_faster'])} its speed."
        )
    return parts


def speed(row: dict[str, Any]) -> float:
    return float(row["ratio"]["median"]) if row["status"] == "ok" else 0.0


def family_section(content: dict[str, Any]) -> list[str]:
    summary = content["summary"]
    parts = [
        f"{summary['families']} configurations with random weights, level {content['settings']['level']}, a "
        f"budget of {content['settings']['budget']:g} s each: {summary['right']} right, "
        f"{summary['accepted_change']} with an accepted change, geometric mean "
        f"{summary['kpt_geometric_mean']:.2f}× against {summary['torch_compile_geometric_mean']:.2f}× for "
        "torch.compile; failures of either count as 1.0.",
    ]
    rows = []
    for name, record in content["families"].items():
        if "failed" in record:
            rows.append([name, record["kind"], record["failed"], "", ""])
            continue
        cells = []
        for contender in ("kpt", "torch.compile"):
            row = record[contender]
            good = row["status"] == "ok" and row["right"]
            cells.append(interval(row["ratio"]) if good else row.get("reason", "wrong"))
        rows.append([name, record["kind"], *cells, " + ".join(record["kpt"].get("accepted", []))])
    return [*parts, table(["family", "kind", "kpt", "torch.compile", "accepted"], rows)]


def overhead_section(content: dict[str, Any]) -> list[str]:
    """Starting, a call through a plan, and a second process, as far as they were measured."""
    goals, parts = content["settings"]["goals"], content["parts"]
    found: list[str] = []
    if "start" in parts:
        start = parts["start"]
        rows = [
            [
                "`import kpt`",
                f"{start['import_seconds'] * 1e3:.0f} ms",
                f"{goals['import_seconds'] * 1e3:.0f} ms",
            ],
            ["`kpt --help`", f"{start['help_seconds']:.2f} s", f"{goals['help_seconds']:.1f} s"],
            ["`kpt plugins list`", f"{start['plugins_list_seconds']:.2f} s", ""],
        ]
        torch = start["import_loads_torch"] or start["plugins_list_loads_torch"]
        found += [
            table(["start", "measured", "goal"], rows),
            f"Torch is {'' if torch else 'not '}loaded by these.",
        ]
    if "call" in parts:
        rows = [
            [
                watched,
                f"{row['positional_microseconds']:.1f}",
                f"{row['keyword_microseconds']:.1f}",
                f"{row['allowed_microseconds']:.1f}",
            ]
            for watched, row in parts["call"].items()
        ]
        header = ["tensors watched", "µs a call, positional", "µs a call, by keyword", "goal"]
        found.append(table(header, rows))
    rows = []
    for key, row in parts.items():
        kind, _, name = key.partition(":")
        if kind == "second":
            first, again = row["first"]["ready_seconds"], row["second"]["ready_seconds"]
            searched = "yes" if row["second"]["searched"] else "no"
            rows.append([name, f"{first:.1f}", f"{again:.1f}", f"{row['share']:.0%}", searched])
    if rows:
        header = ["model", "first process, s", "second, s", "share", "the second searched"]
        goal = f"Goal: at most {goals['second_share']:.0%} of the first and {goals['second_seconds']:.0f} s."
        found += [table(header, rows), goal]
    return found


def block(folder: Path) -> str:
    """The short tables for the README: one for each machine, newest first."""
    machines, families = by_machine(folder, "cpu_models"), latest(folder, "families")
    parts = []
    for path, content in machines:
        rows = []
        for record in content["models"].values():
            if "failed" in record:
                rows.append([record["title"], record["failed"], "", "", ""])
                continue
            cells = [ratio_of(record["contenders"].get(f"kpt {level}")) for level in LEVELS]
            peers = {n: r for n, r in record["contenders"].items() if not n.startswith("kpt") and speed(r)}
            best = max(peers, key=lambda name: speed(peers[name]))
            error = f"error {peers[best]['relative_error']:.0e}"
            rows.append([record["title"], *cells, f"{speed(peers[best]):.2f}× {best}, {error}"])
        parts += [
            table(["times faster than eager fp32", *LEVELS, "fastest peer"], rows),
            origin(path, content),
        ]
    if families:
        parts += family_section(families[1])[:1]
    return "\n\n".join(part.strip() for part in parts) if parts else NOTHING_YET


def ratio_of(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['ratio']['median']:.2f}×" if row["status"] == "ok" else str(row["status"])
