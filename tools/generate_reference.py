"""Write the generated pages of docs/ and the generated part of README.md, or check that they are current.

python tools/generate_reference.py           write them
python tools/generate_reference.py --check   exit with 1 and a diff if one has drifted
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from reference import api, cli, gpu, hooks, results

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
NOTICE = "<!-- Written by tools/generate_reference.py from the code: run `make reference`. -->\n"


def generated() -> dict[Path, str]:
    """What every generated file should hold, by path."""
    readme = ROOT / "README.md"
    return {
        ROOT / "docs/reference/hooks.md": NOTICE + hooks.page(),
        ROOT / "docs/reference/cli.md": NOTICE + cli.page(),
        ROOT / "docs/reference/api.md": NOTICE + api.page(),
        ROOT / "docs/gpu-kernels.md": NOTICE + gpu.page(ROOT / "benchmarks/results"),
        ROOT / "docs/assets" / gpu.PLOT: gpu.plot(ROOT / "benchmarks/results"),
        ROOT / "docs/benchmarks.md": NOTICE + results.page(ROOT / "benchmarks/results"),
        readme: with_block(readme.read_text(encoding="utf-8"), results.block(ROOT / "benchmarks/results")),
    }


def with_block(text: str, block: str) -> str:
    """``text`` with what stands between the two marks replaced by ``block``."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no {BEGIN} … {END} for the figures")
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if a file has drifted"
    )
    arguments = parser.parse_args()
    drifted = []
    for path, content in generated().items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == content:
            continue
        drifted.append(path)
        if arguments.check:
            name = str(path.relative_to(ROOT))
            sys.stderr.writelines(
                difflib.unified_diff(
                    old.splitlines(keepends=True),
                    content.splitlines(keepends=True),
                    name,
                    f"{name} (generated)",
                )
            )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            print(path.relative_to(ROOT))
    if drifted and arguments.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path in drifted)
        raise SystemExit(f"Generated text has drifted from the code: {names}. Run: make reference")


if __name__ == "__main__":
    main()
