"""``kpt bench``: the user's model under every contender that is installed."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt.cli import options
from kpt.cli.output import Output, note, usage
from kpt.specs import LEVELS

if TYPE_CHECKING:
    from kpt.cli.contest import Entrant
    from kpt.cli.sources import Source
    from kpt.judge.kinds import Kind

Names = Annotated[str, typer.Option(metavar="NAME,…", help="Only these contenders, besides eager.")]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",  # typer 0.27 takes a metavar that is the parameter in capitals for the name
        metavar="SECONDS",
        help="How long all of them are timed together (20); with --tune, each size of a kernel (2).",
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Instead of timing a model, let kernels find their block sizes on this device; "
        "--contenders names kernels.",
    ),
]
Tables = Annotated[str, typer.Option(metavar="FOLDER", help="With --tune: where the tables go.")]


def command(
    context: typer.Context,
    model: options.OptionalModelPath = None,
    arch: options.Arch = "",
    inputs: options.Inputs = [],  # noqa: B006 - typer makes a new list for each call
    contenders: Names = "",
    level: options.Level = "production",
    dynamic: options.Dynamic = [],  # noqa: B006
    budget: options.Budget = 120.0,
    seconds: Seconds = None,
    device: options.Device = "",
    trust_model: options.Trust = False,
    plugins: options.Plugins = "",
    no_plugins: options.NoPlugins = False,
    tune: Tune = False,
    tables: Tables = "",
    as_json: options.Json = False,
) -> None:
    """Time a model under every installed contender: eager, kpt, and those that plugins bring.

    All of them run in one interleaved loop on the same fresh inputs. The figures hold for this
    machine, these versions and this moment, and are printed with them.
    """
    output: Output = context.obj
    options.one_of("--level", level, LEVELS)
    options.seconds("--budget", budget)
    if seconds is not None:
        options.seconds("--seconds", seconds)
    if tune:
        if model is not None:
            raise usage("--tune measures kernels, not a model.", "Leave --model out.")
        data = _tuned(
            options.selection(plugins, no_plugins), contenders, 2.0 if seconds is None else seconds, tables
        )
        output.result(data, None if output.json else _tuned_table(data))
        return
    if model is None:
        raise usage("--model is missing.", "Name a model file or folder, or use --tune.")
    from kpt.cli.contest import contest
    from kpt.cli.inputs import dynamic_shapes
    from kpt.cli.sources import open_source

    shapes = dynamic_shapes(dynamic)
    selected = options.selection(plugins, no_plugins)
    source = open_source(
        model, arch=arch, inputs=inputs, device=device, trust=trust_model, plugins=selected, dynamic=shapes
    )
    entrants = _chosen(
        source, contenders, level=level, dynamic_shapes=shapes, budget=budget, plugins=selected
    )
    seconds = 20.0 if seconds is None else seconds
    contest(source.model, entrants, _kinds(source, shapes), seconds=seconds, tell=note)
    data = {
        "model": str(model),
        "machine": machine(source),
        "versions": versions(source),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "contenders": [entrant.to_dict() for entrant in entrants],
    }
    output.result(data, None if output.json else _table(data))


def _tuned(selected: list[str] | None, names: str, seconds: float, tables: str) -> dict[str, Any]:
    from kpt.cli.sources import require_torch
    from kpt.cli.tuning import tune

    require_torch()
    from kpt.plugins import registry

    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    return {"tuned": tune(registry(selected), wanted, seconds, tables or None)}


def _tuned_table(data: dict[str, Any]) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    parts: list[Any] = []
    for found in data["tuned"].values():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("kernel", "sizes", "options", "rule", "best"):
            table.add_column(column)
        for row in found["rows"]:
            chosen = ", ".join(f"{name} {value}" for name, value in row["options"].items())
            sizes = " x ".join(map(str, row["sizes"]))
            rule = "does not run" if row["rule_ms"] is None else f"{row['rule_ms']:.4f} ms"
            table.add_row(row["kernel"], sizes, chosen, rule, f"{row['ms']:.4f} ms")
        parts += [table, f"{found['architecture']}: {found['path']}"]
    return Group(*parts)


def _chosen(source: Source, names: str, **ours: Any) -> list[Entrant]:
    from kpt.cli.contest import eager, installed
    from kpt.cli.contest import ours as kpt_itself

    found = [kpt_itself(source.inputs, **ours), *installed(source.registry)]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [entrant.name for entrant in found]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise usage(f"--contenders {', '.join(unknown)}: unknown.", f"Known are {', '.join(known)}.")
    return [eager(), *(entrant for entrant in found if not wanted or entrant.name in wanted)]


def _kinds(source: Source, shapes: Any) -> Sequence[Kind]:
    """The kinds of the examples, which draw fresh inputs like them."""
    import torch

    from kpt.judge import kinds
    from kpt.judge.calls import as_calls
    from kpt.judge.draws import InputSpec

    spec = InputSpec.from_calls(as_calls(source.inputs), shapes, source.model.forward)
    generator = torch.Generator().manual_seed(0)
    return kinds.of_examples(spec, lambda some: spec.draw(generator, examples=some, own_masks=True))


def machine(source: Source) -> dict[str, Any]:
    """What the figures were measured on."""
    from kpt.profiles import hardware, to_dict

    profile = to_dict(hardware(source.device, measure=False, registry=source.registry))
    return {"device": source.device, "profile": profile, "system": platform.platform()}


def versions(source: Source) -> dict[str, str]:
    """The versions that the figures depend on: Python, torch, the core, plugins, contenders' packages."""
    import importlib_metadata
    import torch

    from kpt import __version__
    from kpt.plugins.isolation import attempt

    found = {"python": platform.python_version(), "torch": torch.__version__, "kpt-core": __version__}
    found.update(source.registry.fingerprint())
    for registered in source.registry.specs("kpt_contenders"):
        for name in registered.spec.requires:
            version = attempt(importlib_metadata.version, name.partition(".")[0]).value
            if version is not None:
                found[name] = str(version)
    return found


def _table(data: dict[str, Any]) -> Any:
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("contender")
    table.add_column("level")
    for column in ("per call", "vs eager", "95 % interval", "error", "set-up"):
        table.add_column(column, justify="right")
    for entry in data["contenders"]:
        if entry["state"] != "ran":
            table.add_row(entry["name"], entry["level"], f"{entry['state']}: {entry['reason']}")
            continue
        error = "?" if entry["error"] is None else f"{entry['error']:.1e}"
        table.add_row(
            entry["name"],
            entry["level"],
            _duration(entry["seconds"]),
            f"{entry['ratio']:.2f}x",
            f"{entry['ratio_low']:.2f} to {entry['ratio_high']:.2f}",
            error,
            f"{entry['setup_seconds']:.1f} s",
        )
    kinds = [_kinds_table(data["contenders"])] if any(each["kinds"] for each in data["contenders"]) else []
    profile = data["machine"]["profile"]
    name = profile["details"].get("model") or profile["name"]
    facts = f"{name}, {profile['compute_units']} compute units, {data['machine']['system']}"
    notes = [f"{entry['name']} prepared {entry['note']}" for entry in data["contenders"] if entry["note"]]
    return Group(table, *kinds, *notes, facts, _pairs(list(data["versions"].items())), data["date"])


def _kinds_table(contenders: Sequence[dict[str, Any]]) -> Any:
    """Time per call of every contender, for each kind of the examples' calls."""
    from rich import box
    from rich.table import Table

    ran = [entry for entry in contenders if entry["state"] == "ran"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("calls")
    for entry in ran:
        table.add_column(entry["name"], justify="right")
    for number, kind in enumerate(ran[0]["kinds"]):
        label = f"{kind['label']}, {kind['share']:.0%} of the calls"
        table.add_row(label, *(_duration(entry["kinds"][number]["seconds"]) for entry in ran))
    return table


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {version}" for name, version in pairs)


def _duration(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"
