"""``kpt optimize``: a model file in, an artifact with its receipt out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpt.cli import options
from kpt.cli.output import CommandError, Output, note, usage
from kpt.specs import LEVELS, OBJECTIVES

if TYPE_CHECKING:
    from kpt.modelfiles import LoadedModel

Out = Annotated[Path | None, typer.Option("--out", "-o", help="The artifact's folder; default: <model>-kpt.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Search even if a recipe is known, and keep none.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there already.")]


def command(
    context: typer.Context,
    model: options.ModelPath,
    arch: options.Arch = "",
    inputs: options.Inputs = [],  # noqa: B006 - typer makes a new list for each call
    level: options.Level = "production",
    objective: options.Objective = "latency",
    dynamic: options.Dynamic = [],  # noqa: B006
    budget: options.Budget = 120.0,
    out: Out = None,
    device: options.Device = "",
    trust_model: options.Trust = False,
    plugins: options.Plugins = "",
    no_plugins: options.NoPlugins = False,
    no_cache: NoCache = False,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Optimise a model file, prove that it is still right, and write an artifact with its receipt.

    The receipt is printed; it names what was tried, kept and rejected. If nothing pays for itself the
    artifact holds the model as it was.
    """
    output: Output = context.obj
    options.one_of("--level", level, LEVELS)
    options.one_of("--objective", objective, OBJECTIVES)
    options.seconds("--budget", budget)
    from kpt.cli.inputs import dynamic_shapes
    from kpt.cli.sources import blaming_the_inputs, open_source, require_torch

    shapes = dynamic_shapes(dynamic)
    folder = Path.cwd() / f"{model.resolve().stem or 'model'}-kpt" if out is None else out
    _check_folder(folder, overwrite)
    selected = options.selection(plugins, no_plugins)
    require_torch()
    from kpt.artifact.folder import require_packages

    require_packages()  # before the search, which would be lost
    source = open_source(
        model, arch=arch, inputs=inputs, device=device, trust=trust_model, plugins=selected, dynamic=shapes
    )
    import kpt

    with progress(budget), blaming_the_inputs(source):
        optimized = kpt.optimize(
            source.model,
            source.inputs,
            level=level,  # type: ignore[arg-type]
            objective=objective,  # type: ignore[arg-type]
            dynamic_shapes=shapes,
            budget=budget,
            plugins=selected,
            cache=not no_cache,
        )
    receipt = kpt.report(optimized)
    save(optimized, folder, source.loaded, cached=not no_cache)
    if source.loaded.kind == "exported":
        note(
            f"The artifact is loaded with the help of {source.loaded.build['folder']}: keep that file there."
        )
    from kpt.artifact.building import loading_call

    note(f"Artifact: {folder}   ({loading_call(folder)}; kpt explain {folder})")
    output.result(
        {"artifact": str(folder), "speedup": receipt.speedup, "receipt": receipt.to_dict()}, receipt
    )


def save(model: Any, folder: Path, loaded: LoadedModel, *, cached: bool) -> None:
    """Write the artifact. Where the file system refuses, the error says what is lost."""
    import kpt

    try:
        # A model folder is rebuilt from its own configuration; a factory or a program has to be remembered.
        remembered = "arch" in loaded.build or loaded.kind == "exported"
        kpt.save(model, folder, build=dict(loaded.build) if remembered else None)
    except OSError as error:
        raise CommandError(
            "not-saved",
            f"The artifact cannot be written to {folder}: {error}.",
            "Choose another --out"
            + ("; if the recipe could be cached, the search is not repeated." if cached else "."),
        ) from error


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse before the search, not after it, to replace what is there or to write where nothing can be."""
    if folder.absolute() in (Path.cwd(), *Path.cwd().parents):
        raise usage(
            f"--out {folder} is where this runs; an artifact takes a folder's place.", "Name another."
        )
    # It is written beside that place and renamed.
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir():
        raise usage(f"--out {folder} cannot be made: {above} is a file.", "Choose another --out.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise usage(f"--out {folder} cannot be made: {above} is not writable.", "Choose another --out.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise usage(f"--out {folder} is a file.", "Choose another --out.")
    if any(folder.iterdir()):
        if not (folder / "recipe.json").is_file():
            raise usage(f"--out {folder} holds something that is not an artifact.", "Choose another --out.")
        if not overwrite:
            raise usage(
                f"--out {folder} holds an artifact already.", "Pass --overwrite, or choose another --out."
            )


@contextmanager
def progress(budget: float) -> Iterator[None]:
    """Show on a terminal, in one line, what the search is doing; elsewhere nothing is printed.

    The line changes with events only: a thread that turned a spinner would take time from what is
    being measured.
    """
    if not sys.stderr.isatty():
        yield
        return
    from kpt.transaction.events import listen

    width = shutil.get_terminal_size().columns - 1

    def show(event: dict[str, Any]) -> None:
        spent = event.get("seconds")
        clock = "" if spent is None else f"[{spent:.0f} of {event.get('budget', budget):.0f} s] "
        line = " ".join(f"{clock}{event.get('kind', '')}: {event.get('text', '')}".split())
        sys.stderr.write(f"\r\x1b[2K{line[:width]}")
        sys.stderr.flush()

    try:
        with listen(show):
            yield
    finally:
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()
