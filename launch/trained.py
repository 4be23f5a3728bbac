"""Commands that use what was trained: evaluate, predict, generate, report, sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_train.launch.output import Json, answer

Run = Annotated[Path, typer.Argument(help="A run directory.")]


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)
    app.command("predict")(predict)
    app.command("generate")(generate)
    app.command("report")(report)
    app.command("sync")(sync)


def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Other data: a name or a folder of shards.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Another split than the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a trained run."""
    from dist_train import trained

    answer(as_json, lambda: trained.evaluate(run, data=data, split=split))


def predict(
    run: Run,
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="Pictures, tables, arrays, or a folder of shards."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The CSV file to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="live|INSTANCE", help="Whose weights, like ema.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the source."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write what a trained run makes of new inputs, a line each."""
    from dist_train.settings import read_assignments
    from dist_train.trained.predict import predict as predict_inputs

    options = read_assignments(settings or [])
    answer(as_json, lambda: predict_inputs(run, source, out, weights=weights, options=options))


def generate(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="The file or folder to write.")],
    count: Annotated[int, typer.Option(min=1, help="How many samples, or tokens of a text.")] = 64,
    prompt: Annotated[str | None, typer.Option(help="The beginning of a text.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the draws.")] = 0,
    weights: Annotated[
        str | None, typer.Option(metavar="live|INSTANCE", help="Whose averaged weights, like ema.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw images or text from a trained run."""
    from dist_train import trained

    answer(
        as_json,
        lambda: trained.generate(run, out, count=count, prompt=prompt, seed=seed, weights=weights),
    )


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, shown side by side.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file (default: report.html of the first run).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file that shows what the curves say."""
    from dist_train.report import write_report

    answer(as_json, lambda: {"report": str(write_report(runs, out))})


def sync(run: Run, as_json: Json = False) -> None:
    """Bring the tracker up to date with a run's metrics."""
    from dist_train.callbacks import wandb

    answer(as_json, lambda: wandb.sync(run))
