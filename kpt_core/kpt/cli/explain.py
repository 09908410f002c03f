"""``kpt explain``: the reasons behind a result, or what kpt sees in a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kpt.cli import options
from kpt.cli.output import CommandError, Output, usage

ReceiptPath = Annotated[Path | None, typer.Argument(help="An artifact's folder, or a receipt as JSON.")]
OptionalModel = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="A model file or folder, to list the ops that are recognised in it."),
]


def command(
    context: typer.Context,
    path: ReceiptPath = None,
    model: OptionalModel = None,
    arch: options.Arch = "",
    inputs: options.Inputs = [],  # noqa: B006 - typer makes a new list for each call
    device: options.Device = "",
    trust_model: options.Trust = False,
    plugins: options.Plugins = "",
    no_plugins: options.NoPlugins = False,
    as_json: options.Json = False,
) -> None:
    """Say what was tried, kept and rejected and why (PATH), or which ops a model computes (--model)."""
    output: Output = context.obj
    if path is not None and model is None:
        receipt = read_receipt(path)
        output.result(receipt.to_dict(), None if output.json else _at_length(receipt))
        return
    if model is None or path is not None:
        raise usage(
            "kpt explain takes an artifact or receipt, or a model.", "kpt explain DIR, or --model FILE."
        )
    from kpt.cli.sources import check_runs, open_source

    selected = options.selection(plugins, no_plugins)
    source = open_source(model, arch=arch, inputs=inputs, device=device, trust=trust_model, plugins=selected)
    check_runs(source)
    data = sites_of(source)
    output.result(data, _table(data))


def read_receipt(path: Path) -> Any:
    """The receipt of an artifact's folder or in a JSON file. Raises `CommandError`."""
    from kpt.cli.sources import require_torch

    require_torch()
    from kpt.transaction.receipt import Receipt

    file = path / "receipt.json" if path.is_dir() else path
    if not file.is_file():
        what = "has no receipt.json, so it is no artifact" if path.is_dir() else "does not exist"
        raise usage(f"{path} {what}.", "Pass what kpt optimize wrote; a model is named with --model.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and isinstance(data.get("receipt"), dict):
            data = data["receipt"]  # what `kpt optimize --json` printed
        return Receipt.from_dict(data)
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = (
            "Pass what kpt optimize wrote: the artifact's folder, or the receipt.json in it; "
            "a model is named with --model."
        )
        raise CommandError("bad-receipt", f"{file} is not a receipt: {error}.", hint) from error


def sites_of(source: Any) -> dict[str, Any]:
    """The ops that are recognised in a model, and what was left alone and why."""
    from kpt import ops
    from kpt.judge.calls import as_calls

    recognition = ops.recognise(source.model, as_calls(source.inputs), registry=source.registry)
    return {
        "model": type(source.model).__name__,
        "parameters": sum(parameter.numel() for parameter in source.model.parameters()),
        "sites": [
            {"op": site.op, "path": site.path, "kind": site.kind, "arguments": dict(site.binding.arguments)}
            for site in recognition.sites
        ],
        "left_alone": [list(entry) for entry in recognition.left_alone],
    }


def _at_length(receipt: Any) -> Any:
    """The receipt with all that `Receipt` itself leaves to its JSON: figures, sites, what was left alone."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("variant", "rule", "figures"):
        table.add_column(column, overflow="fold")
    for entry in (*receipt.accepted, *receipt.rejected):
        figures = ", ".join(f"{name} {value:.3g}" for name, value in sorted(entry.figures.items()))
        table.add_row(entry.name, entry.rule, figures or "none: it was not judged")
    parts: list[Any] = [receipt, table] if table.row_count else [receipt]
    sites = [
        {
            "op": site["op"],
            "path": site.get("path", ""),
            "kind": site.get("kind", ""),
            "arguments": site.get("binding", {}).get("arguments", {}),
        }
        for site in receipt.sites
    ]
    return Group(*parts, f"recognised: {_counted(sites)}", *_listed(sites, receipt.left_alone))


def _counted(sites: list[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for site in sites:
        counts[site["op"]] = counts.get(site["op"], 0) + 1
    return ", ".join(f"{number} × {op}" for op, number in sorted(counts.items())) or "no known op"


def _table(data: dict[str, Any]) -> Any:
    from rich.console import Group

    head = f"{data['model']} ({data['parameters']:,} parameters): {_counted(data['sites'])}"
    return Group(head, *_listed(data["sites"], data["left_alone"]))


def _listed(sites: list[dict[str, Any]], left_alone: list[Any]) -> list[Any]:
    """Every recognised site in a table, and a line for what was left alone and why."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("op", "at", "kind", "with"):
        table.add_column(column, overflow="fold")
    for site in sites:
        arguments = ", ".join(f"{name}={text}" for name, text in site["arguments"].items())
        table.add_row(site["op"], site["path"] or "(the model)", site["kind"], arguments)
    alone = [f"left alone: {where}: {reason}" for where, reason in left_alone]
    return [*([table] if sites else []), *alone]
