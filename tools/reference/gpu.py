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
    "kpt": "#3f51b5",
}
_LEFT, _RIGHT, _ROW, _TOP = 330, 560, 17, 46


def page(folder: Path) -> str:
    """Every case with every contender."""
    found = latest(folder, "gpu_kernels")
    parts = ["# GPU kernels"]
    if found is None:
        return "\n\n".join([*parts, "No result file has been committed yet."]) + "\n"
    path, content = found
    limits = content["ceilings"]
    parts += [
        "Each kernel of the triton plugin beside everyone else who computes the same thing, in one run. "
        "GB/s count the fewest bytes that have to move; times are medians of several rounds in which the "
        "contenders alternate, with the L2 cache flushed before each call; errors are relative to a "
        "reference in fp32 or better. A contender that did not run is listed with its reason.",
        f"Device: {content['device']['name']}; Triton {content['triton']}, torch "
        f"{content['versions']['torch']}; {content['date']}; file `benchmarks/results/{path.name}`. Ceilings "
        f"measured in the same run: a copy moves {limits['copy_GB/s']:.0f} GB/s (read and written), a bf16 "
        f"product of 8192³ runs at {limits['bf16_matmul_8192_TFLOP/s']:.0f} TFLOP/s.",
        f"![Achieved rates against the measured ceilings](assets/{PLOT})",
    ]
    if "launch_microseconds" in content:
        rows = [[name, f"{value:.1f}"] for name, value in content["launch_microseconds"].items()]
        parts += ["## What a launch costs the host", table(["launch of a small rms_norm", "µs"], rows)]
    ops: dict[str, list[dict[str, Any]]] = {}
    for record in content["cases"].values():
        ops.setdefault(record["op"], []).append(record)
    for op, records in ops.items():
        parts.append(f"## {op}")
        for record in records:
            parts += _section(record)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _section(record: dict[str, Any]) -> list[str]:
    unit = record["unit"]
    goal = "" if record.get("goal") is None else f", goal {record['goal']:g} {unit}"
    if "failed" in record:
        return [f"**{record['size']}**{goal}: not measured, {record['failed']}"]
    rows = []
    for name, row in sorted(record["contenders"].items(), key=lambda item: item[1].get("ms", 1e9)):
        shown = f"**{name}**" if name.startswith("kpt") else name
        if "ms" not in row:
            rows.append([shown, "", "", "", row.get("failed", "not timed")])
            continue
        rate = "" if unit == "ms" else f"{row['rate']:.0f}"
        error = "" if row.get("error") is None else f"{row['error']:.1e}"
        memory = f"{row['peak_gib']:.2f} GiB at the peak" if "peak_gib" in row else ""
        rows.append([shown, f"{row['ms']:.4g}", rate, error, memory])
    note = f" {record['note']}" if record.get("note") else ""
    return [
        f"**{record['size']}**{goal}.{note}",
        table(["contender", "ms", "" if unit == "ms" else unit, "error", ""], rows),
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
    height = _TOP + _ROW * len(cases) + 12
    parts = [
        f"<line x1='{_x(share)}' x2='{_x(share)}' y1='{_TOP - 6}' y2='{height - 8}' class='grid'/>"
        f"<text x='{_x(share)}' y='{_TOP - 10}' text-anchor='middle'>{share:.0%}</text>"
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    x = 10.0
    for name, colour in COLOURS.items():
        parts.append(
            f"<circle cx='{x}' cy='12' r='4' fill='{colour}'/><text x='{x + 8}' y='16'>{name}</text>"
        )
        x += 22 + 7 * len(name)
    parts.append(f"<text x='{x}' y='16'>share of the copy bandwidth (GB/s) or of the bf16 matmul rate</text>")
    for number, record in enumerate(cases):
        y = _TOP + _ROW * number + 6
        label = f"{record['op']} {record['size']}"
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4}' text-anchor='end'>{escape(label)}</text>")
        parts.append(f"<line x1='{_x(0)}' x2='{_x(1)}' y1='{y}' y2='{y}' class='grid'/>")
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
    style = "text{font:11px sans-serif;fill:#222}.grid{stroke:#ccc;stroke-width:.6}"
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>"
        f"<style>{style}</style><rect width='{width}' height='{height}' fill='#fff'/>\n{body}\n</svg>\n"
    )
