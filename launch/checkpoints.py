"""`dist-train checkpoint`: look at, prove, compare and carry away what a run saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.launch.output import Json, answer, table

Place = Annotated[
    Path, typer.Argument(help="A run directory (its last good checkpoint), or a checkpoint.")
]

checkpoint = typer.Typer(help="Look at, prove and carry away checkpoints.", rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.add_typer(checkpoint, name="checkpoint")


@checkpoint.command()
def inspect(path: Place, as_json: Json = False) -> None:
    """Show what a checkpoint holds."""
    from dist_train import checkpoint as checkpoints

    answer(as_json, lambda: checkpoints.inspect(path), show=_show)


@checkpoint.command()
def check(path: Place, as_json: Json = False) -> None:
    """Digest every file again; exit 1 when one is damaged."""
    from dist_train import checkpoint as checkpoints

    result = answer(as_json, lambda: checkpoints.check(path), show=_show_check)
    if any(result.values()):
        raise typer.Exit(1)


@checkpoint.command()
def diff(first: Place, second: Place, as_json: Json = False) -> None:
    """Compare two checkpoints tensor by tensor.

    Exit 1 when they differ.
    """
    from dist_train import checkpoint as checkpoints

    result = answer(as_json, lambda: checkpoints.diff(first, second))
    if not result["identical"]:
        raise typer.Exit(1)


@checkpoint.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="live|INSTANCE", help="Whose weights (default: what evaluate uses)."),
    ] = None,
    format: Annotated[
        str, typer.Option(metavar="hf|onnx|pt2", help="Safetensors, or a program of either kind.")
    ] = "hf",
    as_json: Json = False,
) -> None:
    """Write a run's networks for others.

    As the Hugging Face hub has them, or as a program.
    """
    from dist_train.trained.export import export as export_run

    answer(as_json, lambda: export_run(run, out, weights, format))


def _show(result: dict[str, Any]) -> None:
    tensors = result["tensors"]
    table({**result, "tensors": len(tensors)})
    table({name: f"{entry['shape']} in {entry['parts']}" for name, entry in tensors.items()})


def _show_check(result: dict[str, list[str]]) -> None:
    table({name: "; ".join(problems) or "whole" for name, problems in result.items()})
