"""`dist-train sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_train.launch.output import Json, Settings, answer


def register(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    recipe: Annotated[
        str,
        typer.Argument(help="A name (see `list`), a YAML file, a run's or a sweep's directory."),
    ],
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to search, and how (YAML).")
    ] = None,
    on: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    at_once: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Trials side by side (1; elsewhere 4).")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Ranks of each trial, on this machine.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A site's defaults.")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The exact directory of the sweep.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, show what would begin first, and stop.")
    ] = False,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Search for the best settings of a recipe by many runs.

    They run on this machine, Ray or Slurm.
    """
    from dist_train.launch.sweep import sweep as run_sweep
    from dist_train.launch.sweep.preview import show

    result = answer(
        as_json,
        lambda: run_sweep(
            recipe,
            space,
            on=on,
            at_once=at_once,
            ranks=ranks,
            profile=profile,
            run_dir=run_dir,
            resume=resume,
            dry_run=dry_run,
            settings=settings or (),
        ),
        show if dry_run else None,
    )
    if dry_run:
        return
    if result["stopped"] or result["best"] is None:
        typer.echo(f"error: {result['stopped'] or 'no trial ended well'}", err=True)
        raise typer.Exit(1)
