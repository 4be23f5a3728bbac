"""Launched runs: prepared and submitted, found again by name, looked at and ended."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import UserError, nearest
from dist_train.launch.backend import BACKENDS, RECORD, Backend, Job, Status, backend
from dist_train.launch.preflight import check_directory, check_recipe, check_room
from dist_train.launch.snapshot import take_snapshot
from dist_train.launch.spec import make_spec
from dist_train.recipe import Recipe
from dist_train.recipe.checks import check_same_run
from dist_train.restarts import begin_to_count
from dist_train.run_directory import RUNS, RunDirectory, write_file

ENDED = ("done", "failed", "interrupted", "cancelled", "unknown")


@dataclass
class Prepared:
    """A checked job that nobody has yet."""

    recipe: Recipe
    job: Job
    backend: Backend

    def describe(self) -> dict[str, Any]:
        """What `submit` would write."""
        files = self.backend.render(self.job)
        return {"run_dir": str(self.job.run_dir), "on": self.job.spec.on, "files": files}

    def submit(self) -> dict[str, str]:
        """Write recipe, code, script and record into the run directory, and hand the job over."""
        job = self.job
        for run_dir, recipe in recipes(self.recipe, job).items():
            if not (run_dir / "recipe.yaml").is_file():
                RunDirectory.create_at(run_dir)
            write_file(run_dir / "recipe.yaml", recipe.to_yaml().encode())
        if job.code is not None and not job.code.exists():
            take_snapshot(self.recipe, job.code)
        for name, content in self.backend.render(job).items():
            write_file(job.run_dir / name, content.encode())
        for run_dir in job.run_dirs:
            begin_to_count(run_dir)
        job.submitted = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        job.write()
        job.id = self.backend.submit(job)
        job.write()
        return {"run_dir": str(job.run_dir), "on": job.spec.on, "job": job.id}


def prepare(
    recipe: Recipe, flags: Mapping[str, Any], run_dir: Path | None, *, dry_run: bool = False
) -> Prepared:
    """Check all that can be known of a launch; nothing is written. Raises UserError.

    Args:
        flags: settings of Spec that were asked for, over those of the recipe and the profile.
        run_dir: a new directory, or that of a run to go on with; by default a new one in runs/.
    """
    spec = make_spec(recipe.launch, flags)
    chosen = backend(spec.on)
    for name, value in flags.items():
        if value not in (None, [], {}) and name not in chosen.takes | _EVERYWHERE:
            takers = [one for one in BACKENDS if name in backend(one).takes]
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag}: --on {spec.on} does not take it, expected --on {' or '.join(takers)}"
            )
    again = run_dir is not None and (run_dir / "recipe.yaml").is_file()
    if run_dir is None:
        run_dir = RunDirectory.fresh(RUNS, recipe.project, recipe.name)
    run_dir = run_dir.resolve()
    job = Job(spec, recipe.name, run_dir, recipe.root, run_dir / "code")
    if again and (run_dir / RECORD).is_file():
        before = Job.read(run_dir)
        state = backend(before.spec.on).status(before).state
        if state not in ENDED:
            raise UserError(
                f"{run_dir}: is {state} as {before.spec.on} job {before.id}; cancel it first"
            )
        job.project_root = before.project_root
    for path, one in recipes(recipe, job).items():
        if (path / "recipe.yaml").is_file():
            check_same_run(one, Recipe.load(path), path)
    check_directory(run_dir)
    for member in members(recipe, job) or [recipe]:
        check_recipe(member, spec, dry_run=dry_run)
    if not dry_run and not again:
        check_room(members(recipe, job) or [recipe], spec, run_dir)
    chosen.check(job, dry_run)
    return Prepared(recipe, job, chosen)


_EVERYWHERE = {"on", "profile", "gpu", "env", "max_restarts"}


def members(recipe: Recipe, job: Job) -> list[Recipe]:
    """The recipes of an array's members: with their values of `each`, else with seeds that count up."""
    made = []
    for position, number in enumerate(job.spec.members):
        member = recipe if job.spec.each else recipe.set("seed", recipe.seed + number)
        for key, values in job.spec.each.items():
            member = member.set(key, values[position])
        made.append(member)
    return made


def recipes(recipe: Recipe, job: Job) -> dict[Path, Recipe]:
    """The recipe of each directory that holds one: the job's own, and those of an array's members."""
    of_members = {
        job.member(number): member
        for number, member in zip(job.spec.members, members(recipe, job), strict=True)
    }
    return {job.run_dir: recipe} | of_members


def find(run: str) -> Job:
    """The launched run of this directory or name; UserError when there is none, or more than one."""
    if Path(run).is_dir():
        return Job.read(Path(run).resolve())
    there = {path.parent.name: path.parent for path in RUNS.glob(f"*/*/{RECORD}")}
    fitting = [path for name, path in there.items() if name == run]
    fitting = fitting or [path for name, path in there.items() if name.rpartition("-")[0] == run]
    if len(fitting) == 1:
        return Job.read(fitting[0].resolve())
    if fitting:
        names = ", ".join(sorted(path.name for path in fitting))
        raise UserError(f"{run}: expected one launched run, there are {names}")
    if not there:
        raise UserError(f"{run}: no run directory, and no run in {RUNS}/ was started by `launch`")
    raise UserError(
        f"{run}: no launched run of this name in {RUNS}/, expected one of"
        f" {', '.join(sorted(there))}, or a run directory{nearest(run, there)}"
    )


def statuses(run: str | None) -> dict[str, dict[str, str]]:
    """{name: {"on", "job", "state", "detail"}} of one launched run, or of all in runs/."""
    everyone = (Job.read(path.parent) for path in sorted(RUNS.glob(f"*/*/{RECORD}")))
    found = {}
    for job in everyone if run is None else [find(run)]:
        try:
            state = backend(job.spec.on).status(job)
        except UserError as error:  # of where nobody answers; the others are shown all the same
            if run is not None:
                raise
            state = Status("unknown", str(error))
        found[job.run_dir.name] = {
            "on": job.spec.on,
            "job": job.id,
            "state": state.state,
            "detail": state.detail,
        }
    return found


def output(run: str, *, until_end: bool) -> Iterator[str]:
    """What a run has printed, piece by piece; with `until_end` until it has ended, "" where nothing is new."""
    job = find(run)
    chosen = backend(job.spec.on)
    pieces = chosen.logs(job)
    while True:
        ended = not until_end or chosen.status(job).state in ENDED
        text = next(pieces)
        if ended and not text:
            return
        yield text


def cancel(run: str) -> dict[str, str]:
    """Let a run save and end."""
    job = find(run)
    backend(job.spec.on).cancel(job)
    return {"run_dir": str(job.run_dir), "on": job.spec.on, "job": job.id, "cancelled": "asked"}
