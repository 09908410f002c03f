"""What the kernel driver says of AMD GPUs, without starting one: the KFD's topology in sysfs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
#: ``type`` of a link in the KFD's interface (HSA_IOLINKTYPE_XGMI).
_XGMI = 11


@dataclass(frozen=True)
class Node:
    """One GPU: its gfx name, compute units, wavefront, LDS bytes, memory bytes and XGMI links.

    ``links`` maps the number of another node to the links' greatest bandwidth in MB/s (0 if not told).
    """

    number: int
    gfx: str
    compute_units: int
    wavefront: int
    lds: int
    memory: int
    links: dict[int, int] = field(default_factory=dict)


def gpus(root: Path = TOPOLOGY) -> list[Node]:
    """Every GPU that the driver lists, in its order; empty without the driver."""
    return list(_nodes(root))


def _nodes(root: Path) -> Iterator[Node]:
    folders = sorted(
        (entry for entry in root.glob("*") if entry.name.isdigit()), key=lambda entry: int(entry.name)
    )
    for folder in folders:
        facts = _properties(folder / "properties")
        target = facts.get("gfx_target_version", 0)
        if not target or not facts.get("simd_count"):
            continue  # a CPU
        per_unit = max(facts.get("simd_per_cu", 4), 1)
        banks = (_properties(path / "properties") for path in (folder / "mem_banks").glob("*"))
        yield Node(
            number=int(folder.name),
            gfx=gfx_name(target),
            compute_units=facts["simd_count"] // per_unit,
            wavefront=facts.get("wave_front_size", 64),
            lds=facts.get("lds_size_in_kb", 64) * 1024,
            memory=sum(bank.get("size_in_bytes", 0) for bank in banks),
            links=_links(folder),
        )


def _links(folder: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    for kind in ("io_links", "p2p_links"):
        for entry in (folder / kind).glob("*"):
            link = _properties(entry / "properties")
            if link.get("type") == _XGMI and "node_to" in link:
                found[link["node_to"]] = max(link.get("max_bandwidth", 0), found.get(link["node_to"], 0))
    return found


def _properties(path: Path) -> dict[str, int]:
    """A file of ``name number`` lines; lines of another form, and files that cannot be read, hold nothing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].lstrip("-").isdigit()}


def gfx_name(version: int) -> str:
    """The name of a ``gfx_target_version``: 90402 is gfx942; stepping and minor numbers are hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
