"""`dist-train plan`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_train.launch.output import Json, Settings, answer

if TYPE_CHECKING:
    from dist_train.forecast.hardware import Device
    from dist_train.recipe import Recipe

GIB = 2**30


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    recipe: Annotated[
        str, typer.Argument(help="A name (see `list`), a YAML file or a run directory.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and ranks, of each.")] = 1,
    gpu: Annotated[str, typer.Option(help="A named GPU: h100, a100, ...")] = "h100",
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s of yours, in this precision.")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0.001, help="Its memory in GiB.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="Of its memory, GB/s.")] = None,
    link: Annotated[
        float | None, typer.Option(min=0.001, help="To other GPUs, GB/s, one way.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU for one hour.")] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="For whom the job is rendered; by default as `launch:` says, or slurm for several nodes."
        ),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Foresee memory, traffic, hours and cost of a run.

    The GPUs need not be here. Last comes the job that would run it.
    """
    from dist_train.forecast.hardware import device
    from dist_train.forecast.plan import plan as foresee
    from dist_train.recipe import Recipe

    loaded = Recipe.load(recipe, settings or ())
    chosen = _own(device(gpu), gpu, tflops, memory, bandwidth, link)

    def work() -> dict[str, Any]:
        found = foresee(loaded, chosen, nodes=nodes, per_node=gpus_per_node, price=price)
        return found | {"job": job(loaded, on, nodes, gpus_per_node)}

    answer(as_json, work, show=show)


def job(recipe: Recipe, on: str | None, nodes: int, gpus_per_node: int) -> dict[str, Any]:
    """What `launch --dry-run` would show: {"run_dir", "on", "files"}."""
    from dist_train.launch.jobs import prepare
    from dist_train.launch.spec import make_spec

    if on is None and nodes > 1 and make_spec(recipe.launch, {}).on == "local":
        on = "slurm"
    flags = {"on": on, "nodes": nodes, "gpus_per_node": gpus_per_node}
    return prepare(recipe, flags, None, dry_run=True).describe()


def _own(
    base: Device,
    name: str,
    tflops: float | None,
    memory: float | None,
    bandwidth: float | None,
    link: float | None,
) -> Device:
    """A named device with what the flags say instead."""
    changed: dict[str, Any] = {}
    if tflops is not None:
        changed |= dict.fromkeys(("fp32", "tf32", "half"), tflops)
    if memory is not None:
        changed["memory"] = memory
    if bandwidth is not None:
        changed["bandwidth"] = bandwidth
    if link is not None:
        changed |= dict.fromkeys(("link", "network"), link)
    return dataclasses.replace(base, name=f"{name}, changed", **changed) if changed else base


def show(result: dict[str, Any]) -> None:
    """Print what is foreseen."""
    from rich.console import Console
    from rich.table import Table

    screen = Console(highlight=False, width=140)
    say = lambda line: screen.print(line, markup=False)
    say(
        f"{result['recipe']} on {result['nodes']} x {result['ranks'] // result['nodes']} {result['device']}"
    )
    weights = ", ".join(f"{p} {n:,}" for p, n in result["parameters"].items())
    say(f"batch       {result['batch']}")
    say(f"length      {result['steps']:,} steps, {result['epochs']:.4g} epochs")
    say(f"parameters  {weights}")
    for player, rates in result["learning_rate"].items():
        values = "  ".join(f"{rate:.3g}" for rate in rates)
        say(f"rate        {values}   {player} at 0, 25, 50, 75, 100 %")
    say(f"work        {result['flops_per_step']:.4g} FLOPs a step")
    table = Table(box=None)
    table.add_column("strategy", no_wrap=True)
    for name in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "rest",
        "sum",
        "largest\nmicro-batch",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("wire\na step", justify="right", no_wrap=True)
    table.add_column("step\nat best", justify="right", no_wrap=True)
    for row in result["strategies"]:
        held = row["memory"]
        rest = row["total"] - sum(
            held[k] for k in ("weights", "gradients", "optimizer", "activations")
        )
        table.add_row(
            row["strategy"],
            *(size(held[k]) for k in ("weights", "gradients", "optimizer", "activations")),
            size(rest),
            size(row["total"]) if row["fits"] else f"[red]{size(row['total'])}[/]",
            str(row["largest_micro_batch"] or "none"),
            size(row["wire_bytes_per_step"]),
            f"{row['seconds_per_step'] * 1e3:.3g} ms",
        )
    screen.print(table)
    say(
        f"a rank may use {size(result['limit'])}; auto takes {result['auto'] or 'nothing: nothing fits'}"
    )
    if "hours" in result:
        cost = f", {result['cost']:.2f} in all" if "cost" in result else ""
        say(
            f"{result['hours']:.3g} hours at best{cost} ({result['mfu']:.0%} of the peak), without evaluation"
        )
    screen.print(
        "at best: each operation at the roofline of arithmetic and memory, traffic hidden behind it",
        style="dim",
    )
    for path, content in result["job"]["files"].items():
        say(f"\n# the job of launch --on {result['job']['on']}: {path}\n{content.rstrip()}")


def size(number: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
