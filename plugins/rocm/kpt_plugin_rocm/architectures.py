"""Facts about AMD's compute architectures, by gfx name.

Source: AMD's CDNA 2, CDNA 3 and CDNA 4 instruction set guides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """``lds`` is bytes of local data share per compute unit; ``fp8`` the flavour of its 8-bit floats, if any.

    ``fnuz`` has no negative zero and no infinities, and its exponents are biased by one more than in the
    OCP formats, so that the same bits mean another number: e4m3fnuz ends at 240, e4m3fn at 448.
    """

    name: str
    family: str
    wavefront: int
    lds: int
    fp8: str | None
    matrix_dtypes: tuple[str, ...]

    @property
    def fp8_dtypes(self) -> tuple[str, ...]:
        """The names of torch's dtypes that its matrix cores multiply in 8 bits."""
        return {
            None: (),
            "fnuz": ("float8_e4m3fnuz", "float8_e5m2fnuz"),
            "ocp": ("float8_e4m3fn", "float8_e5m2"),
        }[self.fp8]


_CDNA = ("float64", "float32", "float16", "bfloat16", "int8")
KNOWN: dict[str, Architecture] = {
    "gfx90a": Architecture("gfx90a", "MI200 (CDNA 2)", 64, 65_536, None, _CDNA),
    "gfx942": Architecture("gfx942", "MI300 (CDNA 3)", 64, 65_536, "fnuz", _CDNA),
    "gfx950": Architecture("gfx950", "MI350 (CDNA 4)", 64, 163_840, "ocp", _CDNA),
}


def architecture(name: str, wavefront: int = 64, lds: int = 65_536) -> Architecture:
    """Facts about ``name``, which may carry features as in ``gfx942:sramecc+:xnack-``.

    For names that are not in the table, what the driver said (``wavefront``, ``lds``) is taken, and no
    8-bit floats are assumed.
    """
    short = name.partition(":")[0]
    return KNOWN.get(short) or Architecture(
        short, "unknown", wavefront, lds, None, ("float32", "float16", "bfloat16")
    )
