"""Runs with the recipe cache on, and what they left in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

import hostile_passes
import kpt
from fingerprints import fast_calls, optimized
from kpt.transaction import events, recipe
from slow_models import DirectScale, net, plugin

PLUGINS = [plugin(DirectScale, hostile_passes.OnePercent)]
EXAMPLE = torch.randn(32, 16)


def run(**options: object) -> tuple[kpt.Receipt, list[str]]:
    """Optimise a new model with the cache on; its receipt and the kinds of events."""
    kinds: list[str] = []
    with events.listen(lambda event: kinds.append(event["kind"])):
        model = optimized(net(), EXAMPLE, **{"plugins": PLUGINS, "cache": True, "budget": 6.0, **options})
    with torch.no_grad():
        assert torch.allclose(model(EXAMPLE), net()(EXAMPLE), atol=1e-5)
    assert fast_calls(model) == 1
    return kpt.report(model), kinds


def recipes() -> list[Path]:
    return sorted((Path(os.environ["KPT_CACHE_DIR"]) / "recipes").glob("*.json"))


def steps(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text())["recipe"]["steps"]


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Tamper with the recipe, its checksum made right again, as somebody who knows the format would."""

    def tamper(path: Path) -> None:
        body = json.loads(path.read_text())["recipe"]
        change(body)
        path.write_text(json.dumps({"sha256": recipe._digest(body), "recipe": body}))

    return tamper
