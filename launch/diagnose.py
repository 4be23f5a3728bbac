"""`dist-train diagnose`: measured answers to what one would else guess."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_train.launch.output import Json, Settings, answer

diagnose = typer.Typer(help="Measure what one would else guess.", rich_markup_mode=None)


def register(app: typer.Typer) -> None:
    app.add_typer(diagnose, name="diagnose")


@diagnose.command("learning-rate")
def learning_rate(
    recipe: Annotated[str, typer.Argument(help="A name, a YAML file or a run directory.")],
    low: Annotated[float, typer.Option("--from", help="The first rate.")] = 1e-6,
    high: Annotated[float, typer.Option("--to", help="The last rate.")] = 10.0,
    steps: Annotated[int, typer.Option(min=20, help="Steps of the sweep.")] = 200,
    run_dir: Annotated[Path | None, typer.Option(help="The exact directory to write to.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Raise the rate while training, and suggest one.

    It trains once, and plots the loss over the rate.
    """
    from dist_train.diagnose.sweep_rate import sweep_rate
    from dist_train.recipe import Recipe

    made = Recipe.load(recipe, settings or [])
    answer(as_json, lambda: sweep_rate(made, low=low, high=high, steps=steps, run_dir=run_dir))


@diagnose.command("bias-variance")
def bias_variance(
    recipe: Annotated[str, typer.Argument(help="A name, a YAML file or a run directory.")],
    resamples: Annotated[int, typer.Option(min=2, help="How many training sets.")] = 20,
    parallel: Annotated[int, typer.Option(min=1, help="Members trained at a time.")] = 2,
    run_dir: Annotated[Path | None, typer.Option(help="The exact directory to write to.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Split the error into bias and variance.

    It trains on resampled training sets.
    """
    from dist_train.diagnose.bias_variance import measure
    from dist_train.recipe import Recipe

    made = Recipe.load(recipe, settings or [])
    answer(as_json, lambda: measure(made, resamples=resamples, parallel=parallel, run_dir=run_dir))


@diagnose.command("landscape")
def landscape(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="The PNG to write.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Micro-batches of the loss.")] = 4,
    steps: Annotated[int, typer.Option(min=2, help="Steps of Lanczos.")] = 20,
    grid: Annotated[int, typer.Option(min=3, help="Points of the map, a side.")] = 15,
    as_json: Json = False,
) -> None:
    """Draw the loss around a trained run.

    With the way there, the curvature and the kind of the point.
    """
    from dist_train.diagnose.landscape import landscape as draw

    answer(as_json, lambda: draw(run, out=out, batches=batches, steps=steps, grid=grid))


@diagnose.command("linear-probe")
def linear_probe(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    split: Annotated[str, typer.Option(help="Which split to judge by.")] = "test",
    as_json: Json = False,
) -> None:
    """Fit a linear classifier to the codes of an autoencoder.

    Or of a VAE; and, beside it, one to the inputs.
    """
    from dist_train.diagnose.linear_probe import linear_probe as probe

    answer(as_json, lambda: probe(run, split=split))
