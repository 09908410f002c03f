"""docs/gpu-kernels.md and its plot, from the newest gpu_kernels result file and nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from reference.markdown import table
from reference.results import latest

PLOT = "gpu-kernels.svg"
#: Contenders of the plot, with their colours; others are in the tables only.
COLOURS = {
    "eager": "#8d8d8d",
    "torch.compile": "#e08214",
    "liger": "#35978f",
    "flash": "#8c6bb1",
    "cudnn": "#1b9e77",
    "flex": "#c51b7d",
    "torchao": "#a6761d",
    "quack": "#d73027",
    "kpt": "#3f51b5",
}
#: Errors of a result file (by date, case and contender) that say nothing, and why. The file stays as it was
#: written; the page leaves these figures out.
SPOILED: dict[tuple[str, str, str], str] = {}
#: A spread, of the rounds of one contender, with which a verdict says little.
_DOUBTFUL = 0.2
_LEFT, _RIGHT, _ROW, _TOP = 330, 560, 17, 66
_GRID = "stroke='#ccc' stroke-width='.6'"


def page(folder: Path) -> str:
    """Every case with every contender."""
    found = latest(folder, "gpu_kernels")
    parts = ["# GPU kernels: figures"]
    if found is None:
        return "\n\n".join([*parts, "No result file has been committed yet."]) + "\n"
    path, content = found
    limits = content["ceilings"]
    products = ", ".join(
        f"of {name.split('_')[2]}³ at {value:.0f}" for name, value in limits.items() if "matmul" in name
    )
    parts += [
        "Each kernel of the triton plugin beside everyone else who computes the same thing, all "
        "contenders of a case in one run. "
        "GB/s count the fewest bytes that have to move; times are medians of several rounds in which the "
        "contenders alternate, with the L2 cache flushed before each call; the spread is the largest less "
        "the smallest round, over the median: where it is large, the figure says little. Errors are relative "
        "to a reference in fp32 or better. A contender that did not run is listed with its reason.",
        f"Device: {content['device']['name']}; Triton {content['triton']}, torch "
        f"{content['versions']['torch']}, torchao {content['versions']['torchao']}; {content['date']}"
        f"{_commits(content)}; file "
        f"`benchmarks/results/{path.name}`. Ceilings measured in the last run: a copy moves "
        f"{limits['copy_GB/s']:.0f} GB/s (read and written), bf16 products {products} TFLOP/s.",
        f"![Achieved rates against the measured ceilings](assets/{PLOT})",
    ]
    records = list(content["cases"].values())
    measured = [record for record in records if "contenders" in record]
    parts += _goals(measured)
    if "launch_microseconds" in content:
        rows = [[name, f"{value:.1f}"] for name, value in content["launch_microseconds"].items()]
        parts += [
            "## What a launch costs the host",
            "Measured in the last run. Cases of little work, forward and backward above all, wait for the "
            "host: they go by it, and their spread is large.",
            table(["launch of a small rms_norm", "µs"], rows),
        ]
    parts += _again(folder)
    ops: dict[str, list[dict[str, Any]]] = {}
    for record in measured:
        ops.setdefault(record["op"], []).append(record)
    for op, of_op in ops.items():
        parts.append(f"## {op}")
        for record in of_op:
            parts += _section(record, content["date"])
    absent = [[r["op"], r["size"], r.get("failed", "")] for r in records if "contenders" not in r]
    if absent:
        parts += ["## Not measured in this run", table(["case", "size", "why"], sorted(absent))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _again(folder: Path) -> list[str]:
    """What of the goals a later run found, on another host: those of little work go by the host."""
    found = latest(folder, "gpu_kernels_again")
    if found is None:
        return []
    path, content = found
    rows = [
        [record["op"], record["size"], *judged, _yardstick(record)]
        for record in content["cases"].values()
        for judged in _judged_goals(record)
    ]
    reached = sum(row[-2].startswith("reached") for row in rows)
    launch = content["launch_microseconds"]["raw compiled kernel"]
    return [
        "## Measured again",
        f"A part of the cases, all contenders again, on another host with the same GPU; {content['date']}"
        f"{_commits(content)}; file `benchmarks/results/{path.name}`. {reached} of these "
        f"{len(rows)} goals are reached. A launch took {launch:.1f} µs in the last run; "
        "where little is computed, the host and its other tenants decide.",
        table(["case", "size", "goal", "kpt", "", "a yardstick"], rows),
    ]


def _commits(content: dict[str, Any]) -> str:
    """The commits that cases were measured on, where the file says so: a long run may be done in parts."""
    counts: dict[str, int] = {}
    for record in content["cases"].values():
        if "commit" in record and "contenders" in record:
            counts[record["commit"]] = counts.get(record["commit"], 0) + 1
    said = [
        f"{count} cases on commit {commit}" for commit, count in sorted(counts.items(), key=lambda c: -c[1])
    ]
    return "; " + ", ".join(said) if said else ""


def _goals(records: list[dict[str, Any]]) -> list[str]:
    """Every goal, reached or missed."""
    rows = [
        [record["op"], record["size"], *judged, _yardstick(record)]
        for record in records
        for judged in _judged_goals(record)
    ]
    if not rows:
        return []
    reached = sum(row[-2].startswith("reached") for row in rows)
    return [
        "## Goals",
        f"{reached} of {len(rows)} are reached, by the medians; a spread is named from {_DOUBTFUL:.0%} on. "
        "A yardstick is what every contender does too, alone and timed as they are: torch's copy of as many "
        "bytes, where nothing else is said." + _beyond(records, rows),
        table(["case", "size", "goal", "kpt", "", "a yardstick"], rows),
    ]


def _yardstick(record: dict[str, Any]) -> str:
    found = record.get("yardstick")
    if found is None:
        return ""
    named = "" if found["what"].startswith("a copy") else f", {found['what']}"
    value = f"{found['rate']:.0f}" if "rate" in found else f"{found['ms']:.4g}"
    return f"{value} {record['unit']}{named}"


def _beyond(records: list[dict[str, Any]], rows: list[list[str]]) -> str:
    """How many of the missed goals ask for more than the yardstick."""
    missed = sum(not row[-2].startswith("reached") for row in rows)
    beyond = 0
    for record in records:
        alone, own = record.get("yardstick", {}).get("ms"), record["contenders"].get("kpt", {})
        if alone is None or "ms" not in own:
            continue
        if record.get("goal") is not None and record.get("goal_reached") is False:
            goal = float(record["goal"])
            beyond += alone > (goal if record["unit"] == "ms" else own["ms"] * own["rate"] / goal)
        if record.get("ahead_goal_reached") is False:
            factor = float(record["ahead_goal"].partition(" times ")[0])
            beyond += alone > own["ms"] * record["times_as_fast"] / factor
    return f" Of the {missed} goals that are missed {beyond} ask for more than that." if beyond else ""


def _judged_goals(record: dict[str, Any]) -> list[list[str]]:
    """(goal, what was measured, "reached" or by how much it is missed) of one case."""
    own, unit = record["contenders"].get("kpt", {}), record["unit"]
    found = []
    if record.get("goal") is not None:
        goal = float(record["goal"])
        if "ms" not in own:
            found.append([f"{goal:g} {unit}", "", "not measured"])
        else:
            value = own["ms"] if unit == "ms" else own["rate"]
            share = goal / value if unit == "ms" else value / goal
            found.append([f"{goal:g} {unit}", f"{value:.4g} {unit}", _verdict(share, own)])
    if "ahead_goal" in record:
        factor, _, rest = record["ahead_goal"].partition(" times ")
        goal_said = rest if float(factor) == 1 else record["ahead_goal"]
        if "times_as_fast" not in record:
            found.append([goal_said, "", "not measured"])
        else:
            times = record["times_as_fast"]
            rival = record["contenders"].get(rest.rpartition(" as ")[2], {})
            found.append([goal_said, f"{times:.4g} times", _verdict(times / float(factor), own, rival)])
    return found


def _verdict(share: float, *compared: dict[str, Any]) -> str:
    """Of the share of a goal that was reached, with the spread of what was compared where that is large."""
    behind = 1 - share
    said = f"behind by {behind:.0%}" if behind >= 0.01 else f"behind by {behind:.2%}"
    spread = max(row.get("spread", 0.0) for row in compared)
    return ("reached" if share >= 1 else said) + (f" (spread {spread:.0%})" if spread >= _DOUBTFUL else "")


def _section(record: dict[str, Any], date: str) -> list[str]:
    unit, case = record["unit"], f"{record['op']} {record['size']}"
    said = [f"**{record['size']}**."]
    for goal, value, verdict in _judged_goals(record):
        said.append(f"Goal {goal}: {value + ', ' if value else ''}{verdict}.")
    others = {n: r["ms"] for n, r in record["contenders"].items() if "ms" in r and not n.startswith("kpt")}
    if record.get("ahead_of_best_peer") is not None and others:
        best = min(others, key=lambda name: others[name])
        said.append(f"kpt is {record['ahead_of_best_peer']:.2f} times as fast as {best}, the best other.")
    if record.get("note"):
        said.append(record["note"][0].upper() + record["note"][1:] + ".")
    if "reference_failed" in record:
        said.append(f"No errors, because the reference failed: {record['reference_failed']}.")
    said += sorted({why for (day, of, _), why in SPOILED.items() if (day, of) == (date, case)})
    rows = []
    for name, row in sorted(record["contenders"].items(), key=lambda item: item[1].get("ms", 1e9)):
        shown = f"**{name}**" if name.startswith("kpt") else name
        if "ms" not in row:
            rows.append([shown, "", "", "", "", row.get("failed", "not timed")])
            continue
        rate = "" if unit == "ms" else f"{row['rate']:.0f}"
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        if (date, case, name) in SPOILED:
            error = "left out"
        spread = f"{row['spread']:.1%}" if "spread" in row else ""
        memory = f"{row['peak_gib']:.2f} GiB at the peak" if "peak_gib" in row else ""
        rows.append([shown, f"{row['ms']:.4g}", rate, spread, error, memory])
    return [
        " ".join(said),
        table(["contender", "ms", "" if unit == "ms" else unit, "spread", "error", ""], rows),
    ]


def plot(folder: Path) -> str:
    """An SVG: what share of the copy bandwidth or of the matmul rate each contender reached, by case."""
    found = latest(folder, "gpu_kernels")
    if found is None:
        return _svg(_TOP, ["<text x='10' y='20'>no result file yet</text>"])
    _, content = found
    limits = content["ceilings"]
    ceiling = {
        "GB/s": limits["copy_GB/s"],
        "TFLOP/s": max(value for name, value in limits.items() if "matmul" in name),
    }
    cases = [r for r in content["cases"].values() if r["unit"] in ceiling and "contenders" in r]
    families = list(dict.fromkeys(record["op"].partition(" fwd")[0] for record in cases))
    cases.sort(key=lambda record: families.index(record["op"].partition(" fwd")[0]))
    height = _TOP + _ROW * len(cases) + 12
    parts = [
        f"<line x1='{_x(share)}' x2='{_x(share)}' y1='{_TOP - 6}' y2='{height - 8}' {_GRID}/>"
        f"<text x='{_x(share)}' y='{_TOP - 10}' text-anchor='middle'>{share:.0%}</text>"
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    said = "Share of the copy bandwidth (GB/s) or of the bf16 matmul rate (TFLOP/s) that was reached"
    parts.append(f"<text x='10' y='16'>{said}</text>")
    x = 14.0
    for name, colour in COLOURS.items():
        parts.append(
            f"<circle cx='{x}' cy='32' r='4' fill='{colour}'/><text x='{x + 8}' y='36'>{name}</text>"
        )
        x += 22 + 7 * len(name)
    for number, record in enumerate(cases):
        y = _TOP + _ROW * number + 6
        label = f"{record['op']} {record['size']}"
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4}' text-anchor='end'>{escape(label)}</text>")
        parts.append(f"<line x1='{_x(0)}' x2='{_x(1)}' y1='{y}' y2='{y}' {_GRID}/>")
        for name, row in record["contenders"].items():
            chosen = next((c for key, c in COLOURS.items() if key in name.lower()), None)
            if chosen is None or "rate" not in row:
                continue
            size = 5 if name.startswith("kpt") else 3.5
            share = min(row["rate"] / ceiling[record["unit"]], 1.15)
            parts.append(f"<circle cx='{_x(share):.1f}' cy='{y}' r='{size}' fill='{chosen}'/>")
    return _svg(height, parts)


def _x(share: float) -> float:
    return _LEFT + share * _RIGHT / 1.15


def _svg(height: float, parts: list[str]) -> str:
    width = _LEFT + _RIGHT + 20
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>"
        f"<rect width='{width}' height='{height}' fill='#fff'/>\n"
        f"<g font-family='sans-serif' font-size='11' fill='#222'>\n{body}\n</g>\n</svg>\n"
    )
