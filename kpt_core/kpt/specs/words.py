"""The words that specs are written in: levels, modes, objectives and phases."""

from __future__ import annotations

from typing import Literal

Level = Literal["exact", "production", "aggressive"]
Mode = Literal["inference", "training", "generation"]
Objective = Literal["latency", "throughput", "memory"]
Phase = Literal["layout", "kernels", "precision", "shapes", "compile", "runtime"]

LEVELS: tuple[Level, ...] = ("exact", "production", "aggressive")
MODES: tuple[Mode, ...] = ("inference", "training", "generation")
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "memory")
#: The order in which the phases are decided.
PHASES: tuple[Phase, ...] = ("layout", "kernels", "precision", "shapes", "compile", "runtime")
#: The order in which a plan is applied, from the innermost change to the outermost wrapper: weights
#: are converted before kernels pack them, and what a shape variant does to a call (drop a mask, pack
#: a batch) happens before compiled code is entered.
WRAPPING: tuple[Phase, ...] = ("precision", "layout", "kernels", "compile", "shapes", "runtime")
