"""Hyper-parameter search: many runs of one recipe, and what comes of them decides which is next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.errors import UserError, nearest, writing

if TYPE_CHECKING:
    from dist_train.launch.spec import Spec
    from dist_train.launch.sweep.conduct import Sweep
    from dist_train.launch.sweep.plan import Plan
    from dist_train.launch.sweep.progress import Progress
    from dist_train.recipe import Recipe

PLACES = ("local", "ray", "slurm")


def sweep(
    recipe: Recipe | str | Path,
    space: Any = None,
    *,
    on: str = "local",
    at_once: int | None = None,
    ranks: int | None = None,
    profile: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Search for the best settings of a recipe; return `{"sweep", "trials", ..., "best", "recipe", "report"}`.

    Args:
        recipe: as for `train`, or the directory of a sweep, whose recipe and space are taken.
        space: a YAML file, or what it would hold: search, space, and perhaps objective, seed, max_failures.
        on: local, ray or slurm. profile: a site's defaults. at_once: trials side by side (1; elsewhere 4).
        ranks: of each trial, on this machine; elsewhere the recipe's `launch` says it.
        run_dir: the exact directory. resume: go on with what is there, if something is.
        dry_run: check, start and write nothing, and return what would begin first (`preview`).
        settings: changes of the recipe, `a.b=value`.
    Raises: UserError for what can be known before anything runs; Interrupted when a signal ended it early.
    """
    from dist_train.launch.sweep.conduct import Sweep
    from dist_train.launch.sweep.preview import preview
    from dist_train.launch.sweep.progress import Progress
    from dist_train.launch.sweep.report import write_report
    from dist_train.ranks import warm_up
    from dist_train.run_directory import RunDirectory

    if on not in PLACES:
        raise UserError(f"--on {on}: expected one of {', '.join(PLACES)}{nearest(on, PLACES)}")
    if on == "local" and not dry_run:
        warm_up()  # which imports what trials need, while this process imports what checks need
    plan, path = _located(recipe, space, settings, run_dir, resume)
    spec = _spec(plan, on, profile, ranks)
    at_once = at_once or (1 if on == "local" else 4)
    _check(plan, spec, dry_run)
    if dry_run:
        return preview(plan, path, spec, at_once)
    _begin(plan, path)
    directory = RunDirectory(path)
    directory.lock()
    here = os.cpu_count() or 1
    threads = max(1, here // (at_once * spec.ranks)) if on == "local" else None
    going = Sweep(plan, path, threads)
    try:
        with Progress(going) as progress:
            _conduct(going, spec, at_once, progress)
    finally:
        going.journal.close()
        directory.unlock()
        if going.journal.rows:
            write_report(plan, path)
    return _summary(going)


def _located(
    recipe: Recipe | str | Path,
    space: Any,
    settings: Sequence[str],
    run_dir: str | Path | None,
    resume: bool,
) -> tuple[Plan, Path]:
    """What is asked for, and the directory that it is to be in."""
    from dist_train.launch.sweep.plan import FILE, make_plan, read_plan, read_settings
    from dist_train.recipe import Recipe
    from dist_train.run_directory import RUNS, RunDirectory

    given = Path(recipe) if isinstance(recipe, str | Path) else None
    again = given is not None and (given / FILE).is_file()
    if again and given is not None:
        plan = read_plan(given)
        if settings or space is not None:
            raise UserError(
                f"{given}: a sweep goes on as it was begun, expected no --set and no --space"
            )
        if resume and run_dir is None:
            run_dir = given
    else:
        if space is None:
            raise UserError(
                "--space: missing, expected a YAML file with search and space (docs/sweep.md)"
            )
        where = "space" if isinstance(space, dict) else str(space)
        asked = space if isinstance(space, dict) else read_settings(Path(space))
        base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
        plan = make_plan(base, asked, where)
    if resume and run_dir is None:
        raise UserError("--resume: needs --run-dir, the directory of the sweep to go on with")
    if run_dir is None:
        name = f"{plan.recipe.name[:50]}-sweep"
        run_dir = RunDirectory.fresh(RUNS, plan.recipe.project, name)
    path = Path(run_dir).resolve()
    if (path / FILE).is_file():
        if not resume:
            raise UserError(
                f"{path} exists already: give another --run-dir, or --resume to go on with it"
            )
        _same(plan, read_plan(path), path)
    return plan, path


def _same(new: Plan, old: Plan, path: Path) -> None:
    """A sweep goes on as it was begun."""
    for key in new.settings:
        if new.settings[key] != old.settings[key]:
            raise UserError(f"--resume: {key} is not what {path} was begun with")
    if new.recipe.as_dict() != old.recipe.as_dict():
        raise UserError(f"--resume: the recipe is not the one that {path} was begun with")


def _spec(plan: Plan, on: str, profile: str | None, ranks: int | None) -> Spec:
    """Where each trial goes."""
    from dist_train.launch.spec import Spec, make_spec

    if ranks is not None and on != "local":
        raise UserError(
            f"--ranks {ranks}: --on {on} takes --set launch.nodes, launch.ranks_per_node and so on"
        )
    if on == "local":
        if profile is not None:
            raise UserError(f"--profile {profile}: --on local takes none: ranks are --ranks")
        return Spec(on=on, ranks_per_node=ranks)
    spec = make_spec(plan.recipe.launch, {"on": on, "profile": profile})
    if spec.array:
        raise UserError("launch.array: a sweep makes its own runs, expected none")
    return spec


def _check(plan: Plan, spec: Spec, dry_run: bool) -> None:
    """Whatever can be known is checked before anything begins (law 9), at every corner of the space; a dry run
    packs nothing and asks nobody."""
    from dist_train.launch.preflight import check_recipe, check_room

    for corner in plan.corners():
        check_recipe(corner, spec, dry_run=dry_run)
        if dry_run:
            corner.check_components()
    if dry_run:
        return
    if spec.on == "ray":
        from dist_train.launch.ray import check_python, check_token

        check_python()
        check_token(os.environ)
        os.environ["RAY_AUTH_MODE"] = "token"  # read when Ray is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if spec.on != "local":
        check_room([plan.recipe], spec, Path.cwd())


def _begin(plan: Plan, path: Path) -> None:
    """Make the sweep's directory, if it is not there."""
    import json

    from dist_train.launch.sweep.plan import FILE
    from dist_train.run_directory import environment, write_file

    if (path / FILE).is_file():
        return
    with writing(path):
        (path / "trials").mkdir(parents=True, exist_ok=True)
    found = environment(folder=plan.recipe.root) | {"project_root": str(plan.recipe.root)}
    write_file(path / "environment.json", json.dumps(found, indent=2).encode())
    plan.write(path)


def _conduct(going: Sweep, spec: Spec, at_once: int, progress: Progress) -> None:
    from dist_train.launch.sweep.conduct import conduct

    if spec.on == "ray":
        from dist_train.launch.sweep import tune

        tune.conduct(going, spec, at_once, progress)
    elif spec.on == "slurm":
        from dist_train.launch.sweep.slurm import Slurm

        conduct(going, Slurm(going.plan, spec, going.path), at_once, progress)
    else:
        from dist_train.launch.sweep.local import Local

        conduct(going, Local(spec.ranks, at_once), at_once, progress)


def _summary(going: Sweep) -> dict[str, Any]:
    states = [outcome.state for outcome in going.journal.outcomes if outcome is not None]
    best = going.best()
    return {
        "sweep": str(going.path),
        "trials": len(going.journal.trials),
        "failed": states.count("failed"),
        "diverged": states.count("diverged"),
        "stopped": going.stopping,
        "best": best,
        "recipe": str(going.path / "best.yaml") if best else None,
        "report": str(going.path / "report.html"),
    }
