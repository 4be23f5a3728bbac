"""`dist-train launch`: the same run elsewhere; `status`, `logs` and `cancel` for what was launched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_train.errors import UserError
from dist_train.launch.output import Json, Settings, answer

Run = Annotated[
    str, typer.Argument(help="A launched run: its name (NAME-ID, or NAME) or directory.")
]


def register(app: typer.Typer) -> None:
    app.command("launch")(launch)
    app.command("status")(status)
    app.command("logs")(logs)
    app.command("cancel")(cancel)


def launch(
    recipe: Annotated[
        str, typer.Argument(help="A name (see `list`), a YAML file or a run directory.")
    ],
    on: Annotated[str | None, typer.Option(help="local, accelerate, slurm or ray.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A site's defaults.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="How many nodes.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs a node, a rank each; 0: ranks on CPUs.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="What GPUs (h100, ...): their memory is checked.")
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option(help="Ranks a node.")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(help="Cores a rank.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The exact run directory.")] = None,
    settings: Settings = None,
    max_restarts: Annotated[
        int | None, typer.Option(help="Restarts in a row without progress (3).")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variable whose value travels; repeatable."),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="A shell line before the ranks; repeatable."),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm: quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Slurm: features of nodes.")] = None,
    limit: Annotated[
        str | None, typer.Option("--time", metavar="HH:MM:SS", help="Slurm: time limit.")
    ] = None,
    mem: Annotated[str | None, typer.Option(help="Slurm: memory a node, like 64G.")] = None,
    array: Annotated[
        str | None, typer.Option(metavar="0-3", help="Slurm: a run a member, see --each.")
    ] = None,
    each: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=[V,V]", help="A setting's value for each member (their seeds)."),
    ] = None,
    dependency: Annotated[str | None, typer.Option(help="Slurm: jobs to wait for.")] = None,
    mail_user: Annotated[str | None, typer.Option(help="Slurm: whom to write to.")] = None,
    container_image: Annotated[str | None, typer.Option(help="Slurm with pyxis.")] = None,
    container_mounts: Annotated[str | None, typer.Option(help="Slurm with pyxis.")] = None,
    notice: Annotated[
        int | None, typer.Option(help="Slurm: seconds before the limit to save at (120).")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of sbatch; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, show what would be submitted, and stop.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its output until it ends.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe in the background, here, on Slurm or on Ray.

    It is checked first, runs with its code as it is now, and starts again where it was cut off.
    """
    from dist_train.launch.jobs import prepare
    from dist_train.recipe import Recipe

    flags: dict[str, Any] = {
        "on": on,
        "profile": profile,
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "gpu": gpu,
        "ranks_per_node": ranks_per_node,
        "cpus_per_rank": cpus_per_rank,
        "max_restarts": max_restarts,
        "env": env,
        "setup": setup,
        "partition": partition,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "time": limit,
        "mem": mem,
        "array": array,
        "each": _each(each or []),
        "dependency": dependency,
        "mail_user": mail_user,
        "container_image": container_image,
        "container_mounts": container_mounts,
        "notice": notice,
        "sbatch": dict(_pair(text, "--sbatch") for text in sbatch or []),
    }
    resolved = Recipe.load(recipe, settings or ())
    prepared = prepare(resolved, flags, run_dir, dry_run=dry_run)
    if dry_run:
        answer(as_json, prepared.describe, show=_show_files)
        return
    answer(as_json, prepared.submit)
    if follow:
        _follow(str(prepared.job.run_dir))


def status(
    run: Annotated[
        str | None, typer.Argument(help="A launched run; all in runs/ without it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a launched run is, or all of them."""
    from dist_train.launch import jobs

    answer(as_json, lambda: jobs.statuses(run), show=_show_statuses)


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a launched run has printed."""
    from dist_train.launch import jobs

    if follow:
        _follow(run)
        return
    answer(
        as_json,
        lambda: {"output": "".join(jobs.output(run, until_end=False))},
        show=lambda result: typer.echo(result["output"], nl=False),
    )


def cancel(run: Run, as_json: Json = False) -> None:
    """Let a launched run save and end.

    `launch RUN_DIR --run-dir RUN_DIR` goes on with it.
    """
    from dist_train.launch import jobs

    answer(as_json, lambda: jobs.cancel(run))


def _follow(run: str) -> None:
    """Show the output of a run as it comes; ends with the run, and with its failure."""
    from dist_train.interruption import REQUEUE
    from dist_train.launch import jobs

    for text in jobs.output(run, until_end=True):
        typer.echo(text, nl=False)
        if not text:
            time.sleep(0.5)
    [state] = jobs.statuses(run).values()
    if state["state"] in ("failed", "cancelled", "unknown"):
        typer.echo(f"{run}: {state['state']} ({state['detail']})", err=True)
        raise typer.Exit(1)
    if state["state"] == "interrupted":  # saved, and not put back into a queue by anyone
        raise typer.Exit(REQUEUE)


def _each(texts: list[str]) -> dict[str, list[Any]]:
    from dist_train.yaml_text import read_yaml

    found: dict[str, list[Any]] = {}
    for text in texts:
        key, value = _pair(text, "--each")
        values = read_yaml(value, f"--each {text}")
        if not isinstance(values, list):
            raise UserError(f"--each {text}: expected KEY=[VALUE, VALUE, ...], one for each member")
        found[key] = values
    return found


def _pair(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{flag} {text}: expected KEY=VALUE")
    return key.strip(), value


def _show_files(result: dict[str, Any]) -> None:
    for path, content in result["files"].items():
        typer.echo(f"# {path}\n{content}")


def _show_statuses(found: dict[str, dict[str, str]]) -> None:
    if not found:
        typer.echo("no run in runs/ was started by `launch`", err=True)
    width = max(map(len, found), default=0)
    for name, state in found.items():
        typer.echo(f"{name:<{width}}  {state['on']:<10} {state['state']:<11} {state['detail']}")
