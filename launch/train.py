"""`dist-train train`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_train.errors import UserError
from dist_train.launch.output import Json, Settings, answer

if TYPE_CHECKING:
    from dist_train.recipe import Recipe


class Order(StrEnum):
    """In which order a rank takes its micro-batches; reversed measures the noise floor of summation."""

    forward = "forward"
    reversed = "reversed"


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    recipe: Annotated[
        str, typer.Argument(help="A name (see `list`), a YAML file or a run directory.")
    ],
    ranks: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Start so many ranks on this machine.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of failed ranks, in a row without progress.")
    ] = 0,
    run_dir: Annotated[Path | None, typer.Option(help="The exact run directory.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|PATH", help="Go on from here; auto starts afresh if it must."),
    ] = None,
    settings: Settings = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="2 steps, an evaluation, a save, a resume.")
    ] = False,
    until: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Pause there, like '2 epochs'; --resume goes on."),
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, metavar="1", help="Repeat so many batches: the loss must fall."),
    ] = None,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the resolved recipe and stop.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2, help="Train so many seeds, shared out over the ranks; judge them together."
        ),
    ] = None,
    micro_order: Annotated[Order, typer.Option(hidden=True)] = Order.forward,
    as_json: Json = False,
) -> None:
    """Train a recipe, in this process or on several ranks.

    Under torchrun, accelerate launch or deepspeed each process joins as the rank that it was given.
    """
    from dist_train.launch.accelerate import adopt
    from dist_train.ranks import warm_up
    from dist_train.recipe import Recipe

    resolved = adopt(Recipe.load(recipe, settings or ()), os.environ)
    if print_recipe:
        answer(as_json, resolved.as_dict, show=lambda _: typer.echo(resolved.to_yaml(), nl=False))
        return
    if max_restarts and ranks is None:
        raise UserError(
            f"--max-restarts {max_restarts}: needs --ranks, the ranks that this command starts"
        )
    if ranks is not None and "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--ranks {ranks}: this process is one of the {os.environ['WORLD_SIZE']} ranks of a launcher "
            "(WORLD_SIZE is set), expected one of the two"
        )

    if seeds is not None and (quick or until or overfit or max_restarts):
        raise UserError(
            "--seeds: not together with --quick, --until, --overfit or --max-restarts: each seed is a whole run"
        )
    if quick and until:
        raise UserError(f"--until {until}: not together with --quick, which is two steps")
    if ranks is not None:
        warm_up()  # which imports what ranks need, while this process imports what checks need

    from dist_train import run
    from dist_train.ranks.parent import die_with_parent

    if "WORLD_SIZE" in os.environ:
        die_with_parent()  # a launcher that is killed (torchrun, a Ray worker) leaves its ranks running

    if seeds is not None:
        from dist_train.launch.trained import show_members
        from dist_train.trained.seeds import train_seeds

        answer(
            as_json,
            lambda: train_seeds(resolved, seeds, run_dir=run_dir, resume=resume, ranks=ranks),
            show=show_members,
        )
        return
    answer(
        as_json,
        lambda: run.train(
            resolved,
            run_dir=run_dir,
            resume=resume,
            quick=quick,
            until=until,
            overfit=overfit,
            micro_order=micro_order.value,
            ranks=ranks,
            max_restarts=max_restarts,
        ),
        show=None if _is_silent(resolved) else lambda _: None,
    )


def _is_silent(recipe: Recipe) -> bool:
    """Whether no console callback tells how it ended."""
    return all(spec["name"] != "console" for spec in recipe.callback_specs.values())
