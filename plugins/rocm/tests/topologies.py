"""Topologies of AMD machines in the form of the driver's files (``/sys/class/kfd/kfd/topology/nodes``).

No machine was at hand to record them on: names and units of the lines are those of the amdgpu driver, the
numbers follow from AMD's published specifications. The driver counts compute units in SIMDs (four to a unit)
and a link's bandwidth in MB/s each way: 16 lanes at 25 GT/s (MI200), 32 (MI300) or 38.4 (MI350) for each link
between two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PCIE, XGMI = 2, 11
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What the driver says of one GPU: for a package of two dies (MI200), of one of them."""

    target: int
    units: int
    lds_kb: int
    memory: int
    bus_width: int
    xcc: int
    device_id: int
    #: MB/s each way of one link.
    link: int

    def properties(self, links: int, number: int) -> dict[str, int]:
        return {
            "cpu_cores_count": 0,
            "simd_count": 4 * self.units,
            "mem_banks_count": 1,
            "caches_count": 0,
            "io_links_count": links,
            "p2p_links_count": 0,
            "cpu_core_id_base": 0,
            "simd_id_base": 2147487744 + 4096 * number,
            "max_waves_per_simd": 8,
            "lds_size_in_kb": self.lds_kb,
            "gds_size_in_kb": 0,
            "num_gws": 64,
            "wave_front_size": 64,
            "array_count": 4 * self.xcc,
            "simd_arrays_per_engine": 1,
            "cu_per_simd_array": 16,
            "simd_per_cu": 4,
            "max_slots_scratch_cu": 32,
            "gfx_target_version": self.target,
            "vendor_id": 4098,
            "device_id": self.device_id,
            "location_id": 256 * number,
            "domain": 0,
            "drm_render_minor": 127 + number,
            "hive_id": 2**63 + 1,  # wider than a signed number of 64 bits
            "num_sdma_engines": 2,
            "num_sdma_xgmi_engines": 14,
            "local_mem_size": 0,  # the memory stands with its bank
            "unique_id": 2**63 + number,
            "num_xcc": self.xcc,
        }


MI250X = Chip(90010, 110, 64, 64 * GIB, 4096, 1, 0x7408, link=50_000)
MI300X = Chip(90402, 304, 64, 192 * GIB, 8192, 8, 0x74A1, link=64_000)
MI350X = Chip(90500, 256, 160, 288 * GIB, 8192, 8, 0x75A0, link=76_800)

#: Which GPUs are joined by how many links each: two packages of two dies, and two of one.
TWO_PACKAGES = {(1, 2): 4, (3, 4): 4, (1, 3): 1, (2, 4): 1}
PAIR = {(1, 2): 1}


def write(root: Path, chip: Chip, joined: Mapping[tuple[int, int], int]) -> Path:
    """A CPU as node 0 and GPUs from 1, each on PCIe and joined by XGMI as ``joined`` says."""
    write_node(root, 0, {"cpu_cores_count": 96, "simd_count": 0, "gfx_target_version": 0}, banks=[(GIB, 64)])
    for number in sorted({end for pair in joined for end in pair}):
        links = [_link(PCIE, number, 0, 20, 64_000)]
        for pair, lanes in joined.items():
            if number in pair:
                other = pair[1 - pair.index(number)]
                links.append(_link(XGMI, number, other, 15, lanes * chip.link))
        properties = chip.properties(len(links), number)
        write_node(root, number, properties, links, [(chip.memory, chip.bus_width)])
    return root


def _link(kind: int, start: int, end: int, weight: int, bandwidth: int) -> dict[str, int]:
    return {
        "type": kind,
        "version_major": 0,
        "version_minor": 0,
        "node_from": start,
        "node_to": end,
        "weight": weight,
        "min_latency": 0,
        "max_latency": 0,
        "min_bandwidth": bandwidth,
        "max_bandwidth": bandwidth,
        "recommended_transfer_size": 0,
        "flags": 1,
    }


def write_node(
    root: Path,
    number: int,
    facts: Mapping[str, int],
    links: Iterable[Mapping[str, int]] = (),
    banks: Iterable[tuple[int, int]] = (),
) -> None:
    """One node's folder; ``banks`` are bytes and width in bits."""
    node = root / str(number)
    _write(node, facts)
    for index, link in enumerate(links):
        _write(node / "io_links" / str(index), link)
    for index, (size, width) in enumerate(banks):
        facts = {"heap_type": 1, "size_in_bytes": size, "flags": 0, "width": width, "mem_clk_max": 1600}
        _write(node / "mem_banks" / str(index), facts)


def _write(folder: Path, facts: Mapping[str, int]) -> None:
    folder.mkdir(parents=True)
    text = "".join(f"{name} {value}\n" for name, value in facts.items())
    (folder / "properties").write_text(text, encoding="utf-8")
