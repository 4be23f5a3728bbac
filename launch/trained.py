"""Commands that use what was trained: evaluate, predict, generate, report, sync."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.launch.output import Json, answer

Run = Annotated[Path, typer.Argument(help="A run directory.")]


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)
    app.command("predict")(predict)
    app.command("generate")(generate)
    app.command("ensemble")(ensemble)
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
    prompt: Annotated[
        str | None, typer.Option(help="The beginning of a text, or what to translate.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the draws.")] = 0,
    weights: Annotated[
        str | None, typer.Option(metavar="live|INSTANCE", help="Whose averaged weights, like ema.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="How a translation begins.")] = None,
    beam: Annotated[int | None, typer.Option(help="Search with so many hypotheses.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the draws; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest that have this probability.")
    ] = None,
    length_power: Annotated[
        float | None, typer.Option(help="Hypotheses are ranked by log p / length ** this.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw images or text from a trained run, or translate a prompt."""
    from dist_train import trained

    asked = {
        "beam": beam,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "length_power": length_power,
    }
    answer(
        as_json,
        lambda: trained.generate(
            run,
            out,
            count=count,
            prompt=prompt,
            seed=seed,
            weights=weights,
            prefix=prefix,
            decoding={name: value for name, value in asked.items() if value is not None},
        ),
    )


class Way(StrEnum):
    """How members are combined."""

    mean = "mean"
    vote = "vote"


def ensemble(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, or checkpoints of a run (its snapshots).")
    ],
    how: Annotated[
        Way, typer.Option(help="The mean of the probabilities (a mixture), or the majority's vote.")
    ] = Way.mean,
    data: Annotated[
        str | None, typer.Option(help="Other data: a name or a folder of shards.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Another split than the recipe's.")] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="live|INSTANCE", help="Whose averaged weights, like ema.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A CSV file: what they say of each sample.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG: the reliability diagram.")] = None,
    as_json: Json = False,
) -> None:
    """Judge the members of an ensemble, alone and together.

    By accuracy, likelihood, calibration and disagreement.
    """
    from dist_train.trained.ensemble import ensemble as judge_together

    answer(
        as_json,
        lambda: judge_together(
            runs, how=how.value, data=data, split=split, weights=weights, out=out, plot=plot
        ),
        show=show_members,
    )


def show_members(result: Mapping[str, Any]) -> None:
    """Print each member's figures, their mean, and those of all together, a line each."""
    names = list(result["together"])
    rows = [
        *((one["member"], one) for one in result["members"]),
        ("mean of the members", result["mean_of_members"]),
        (f"together ({result['how']})", result["together"]),
    ]
    width = max(len(name) for name, _ in rows)
    typer.echo(f"{'':<{width}}" + "".join(f"{name:>20}" for name in names))
    for label, figures in rows:
        values = ["-" if figures[name] is None else f"{figures[name]:.4f}" for name in names]
        typer.echo(f"{label:<{width}}" + "".join(f"{value:>20}" for value in values))
    for name in ("samples", "disagreement", "ambiguity", "run_dir", "out", "plot"):
        if name in result:
            value = result[name]
            typer.echo(f"{name}: {f'{value:.4f}' if isinstance(value, float) else value}")


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, shown side by side; or one sweep's.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file (default: report.html of the first run).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file that shows what the curves say."""
    from dist_train.report import write_report

    if len(runs) == 1 and (runs[0] / "sweep.yaml").is_file():
        from dist_train.launch.sweep.plan import read_plan
        from dist_train.launch.sweep.report import write_report as write_sweep_report

        answer(
            as_json, lambda: {"report": str(write_sweep_report(read_plan(runs[0]), runs[0], out))}
        )
        return
    answer(as_json, lambda: {"report": str(write_report(runs, out))})


def sync(run: Run, as_json: Json = False) -> None:
    """Bring the tracker up to date with a run's metrics."""
    from dist_train.callbacks import wandb

    answer(as_json, lambda: wandb.sync(run))
