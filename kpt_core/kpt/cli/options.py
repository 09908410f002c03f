"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpt.cli.output import usage
from kpt.specs import LEVELS, OBJECTIVES

ModelPath = Annotated[
    Path, typer.Option("--model", "-m", help="A .pt, .pth, .bin or .safetensors file, or a model folder.")
]
OptionalModelPath = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A .pt, .pth, .bin or .safetensors file, or a model folder."),
]
Arch = Annotated[
    str, typer.Option(metavar="MODULE:FACTORY", help="Builds the module that weights are loaded into.")
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--inputs",
        "-i",
        metavar="SPEC|FILE",
        help="Example inputs: 'input_ids=int64[1,128]:0..30522', or a .pt, .safetensors, .npz, .npy or "
        ".json file.",
    ),
]
Dynamic = Annotated[
    list[str],
    typer.Option(metavar="NAME:AXIS=SYMBOL,…", help="Dimensions that vary: 'input_ids:0=batch,1=sequence'."),
]
Trust = Annotated[
    bool, typer.Option("--trust-model", help="Allow a model file that executes code while it is loaded.")
]
Device = Annotated[str, typer.Option(help="Where the model runs, for instance cpu or cuda:0.")]
Plugins = Annotated[str, typer.Option(metavar="NAME,…", help="Use these plugins and no others.")]
NoPlugins = Annotated[bool, typer.Option("--no-plugins", help="Use no plugins.")]
Level = Annotated[str, typer.Option(help=f"How far precision may drop: {', '.join(LEVELS)}.")]
Objective = Annotated[str, typer.Option(help=f"What to improve: {', '.join(OBJECTIVES)}.")]
Budget = Annotated[float, typer.Option(metavar="SECONDS", help="How long the search may take.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as one JSON object.")]


def selection(plugins: str, no_plugins: bool) -> list[str] | None:
    """The plugins that the options select; None for all that are installed."""
    if no_plugins and plugins:
        raise usage("--plugins and --no-plugins exclude each other.")
    if no_plugins:
        return []
    names = [name.strip() for name in plugins.split(",") if name.strip()]
    if plugins and not names:
        raise usage(f"--plugins {plugins!r} names no plugin.", "Use --no-plugins for none, or leave it out.")
    return names or None


def seconds(option: str, value: float) -> float:
    """``value`` if it is a length of time; raises a usage error that says what is expected."""
    if not 0 < value < float("inf"):
        raise usage(f"{option} {value:g} is not a number of seconds above 0.", f"Pass one: {option} 60.")
    return value


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """``value`` if it is one of ``known``; raises a usage error that lists them."""
    if value not in known:
        raise usage(f"{option} {value!r} is unknown.", f"Known are {', '.join(known)}.")
    return value
