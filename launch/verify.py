"""`dist-train verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dist_train.launch.output import Json, Settings, answer

COLUMNS = {
    "loss": "loss",
    "gradient": "gradient",
    "state": "state",
    "free loss": "loss",
    "free weights": "weights",
}
"""What is compared: heading by kind, of which the last two are free-running."""


WIDTH = 120


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    recipe: Annotated[
        str, typer.Argument(help="A name (see `list`), a YAML file or a run directory.")
    ],
    ranks: Annotated[int, typer.Option(help="Ranks of the parallel runs, on this machine.")] = 2,
    steps: Annotated[
        int | None, typer.Option(help="Steps (default 5, or until each player had a turn).")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Prove that ranks, sharding and kills leave a run the same.

    One process = N ranks under ddp, ZeRO 1-3 and fsdp2 = killed and resumed. Exit 1 when one differs.
    """
    from dist_train.recipe import Recipe
    from dist_train.verify import verify as prove

    loaded = Recipe.load(recipe, settings or ())
    say = lambda line: typer.echo(line, err=True)
    result = answer(as_json, lambda: prove(loaded, ranks=ranks, steps=steps, report=say), show=show)
    if not result["passed"]:
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """Print the table, what failed, and what the bounds are."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(highlight=False, width=WIDTH)
    table = Table(
        title=f"{result['recipe']}: {result['steps']} steps, {result['precision']}, {result['device']}",
        title_justify="left",
        box=None,
    )
    table.add_column("run", no_wrap=True)
    table.add_column("ranks", justify="right")
    for kind, heading in COLUMNS.items():
        group = "free" if kind.startswith("free") else "locked"
        table.add_column(f"{group}\n{heading}", justify="right", no_wrap=True)
    table.add_column("")
    for row in result["rows"]:
        table.add_row(row["run"], str(row["ranks"]), *_cells(row), _verdict(row))
    screen.print(table)
    for row in result["rows"]:
        if row["verdict"] == "refused":
            screen.print(f"{row['run']}: refused: {row['refused']}", markup=False)
        if row["verdict"] == "fail":
            more = f" (and {row['broken'] - 1} more)" if row["broken"] > 1 else ""
            screen.print(f"{row['run']}: first to differ: {row['first']}{more}", markup=False)
            if row["cause"]:
                screen.print(f"  usually: {row['cause']}", markup=False)
    for line in _notes(result):
        screen.print(line, style="dim", markup=False)


def _cells(row: dict[str, Any]) -> list[str]:
    if row.get("exact"):
        return ["0 bits"] * len(COLUMNS)
    worst = row.get("worst", {})
    return [_cell(worst[kind]) if kind in worst else "-" for kind in COLUMNS]


def _cell(worst: dict[str, Any]) -> str:
    if worst["bound"] is None:
        return f"{worst['difference']:.0e}"
    return f"{worst['difference']:.0e}/{worst['bound']:.0e}"


def _verdict(row: dict[str, Any]) -> str:
    return {"pass": "[green]same[/]", "fail": "[bold red]DIFFERS[/]"}.get(
        row["verdict"], row["verdict"]
    )


def _notes(result: dict[str, Any]) -> list[str]:
    operations = ", ".join(result["nondeterministic"])
    return [
        "Largest difference / its bound. locked: one step from each state of the one process; free: all steps alone.",
        "loss and gradient of every turn; state: weights, optimiser, buffers, averages after the step.",
        "A bound is ten times the floor, what one process differs by when it only sums in another order, and at least",
        "the rounding of fp32: only order may differ. Killed and resumed in the same place, nothing may.",
        f"no deterministic kernel: {operations or 'every operation has one here'}",
    ]
