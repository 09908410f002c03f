"""Which instructions a matrix product of a kernel should become, and how many of them at least."""

from __future__ import annotations

from kpt_plugin_triton.aot import Product, Resources

#: What the instructions of a unit are called in the assembly.
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "mfma": "v_mfma"}
#: The rows from which on a product belongs on the units that multiply whole tiles out of shared memory.
LARGE = 64


def expected(product: Product, target: str) -> str:
    """The unit that multiplies fastest there.

    From 64 rows on that is wgmma on sm_90 and tcgen05 on sm_100; for fewer there is mma.sync alone. NVIDIA's
    units do not multiply fp32 at full precision.
    """
    if target.startswith("gfx"):
        return "mfma"
    if product.dtype == "f32":
        return "none"
    if product.rows < LARGE:
        return "mma"
    return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(target, "mma")


def least(product: Product, target: str, warps: int) -> int:
    """How many instructions of its unit one warp (one group of four, one program) needs for a product."""
    rows, columns, depth = product.rows, product.columns, product.depth * product.bytes
    if product.unit == "wgmma":
        return _blocks(rows, LARGE * (warps // 4)) * _blocks(columns, 256) * _blocks(depth, 32)
    if product.unit == "tcgen05":
        return _blocks(rows, 128) * _blocks(columns, 256) * _blocks(depth, 32)
    if product.unit == "mma":
        return _blocks(rows * columns * depth, 16 * 8 * 32 * warps)
    if product.unit == "mfma":
        return _blocks(rows * columns * depth, 32 * 32 * (32 if target == "gfx950" else 16) * warps)
    return 0


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def faults(used: Resources, warps: int, small: str | None) -> list[str]:
    """What is wrong with how a kernel's products were compiled.

    ``small`` says why tiles of fewer than 64 rows are right; without a reason they are a fault where larger
    ones would be on a faster unit.
    """
    found: list[str] = []
    if not used.products:
        found.append("multiplies no matrices")
    for product in used.products:
        wanted = expected(product, used.target)
        if product.unit != wanted:
            found.append(f"{product} is not on {wanted}")
        elif wanted == "mma" and used.target != "sm_80" and small is None:
            found.append(f"{product}: fewer than {LARGE} rows, and no reason why")
    for unit, name in INSTRUCTIONS.items():
        needed = sum(least(p, used.target, warps) for p in used.products if p.unit == unit)
        there = used.matrix.get(name, 0)
        if there < needed:
            found.append(f"{there} {name} instructions, its products need {needed}")
        if there and not needed:
            found.append(f"{there} {name} instructions, and no product on that unit")
    return found
