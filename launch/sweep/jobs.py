"""A trial as a launched job: its record, which `status`, `logs` and `cancel` read, and the code that it runs."""

from __future__ import annotations

import time
from pathlib import Path

from dist_train.launch.backend import Job
from dist_train.launch.snapshot import has_own_parts, take_snapshot
from dist_train.launch.spec import Spec
from dist_train.launch.sweep.conduct import Task
from dist_train.launch.sweep.plan import Plan


def take_code(plan: Plan, path: Path) -> Path:
    """The copy of the code that all trials run: made once, so that a sweep is one thing."""
    code = path / "code"
    if not code.exists():
        own = [recipe for recipe in plan.corners() if has_own_parts(recipe)]
        take_snapshot(own[0] if own else plan.recipe, code)
    return code


def job_of(task: Task, spec: Spec, path: Path) -> Job:
    """A trial's job, not written yet; `path` is the sweep's directory."""
    name = f"{path.name}-{task.leg.trial}"
    return Job(spec, name, task.run_dir, task.recipe.root, path / "code", until=task.until)


def submitted(job: Job, identity: str) -> None:
    """Write down that a job is out."""
    job.id = identity
    job.submitted = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    job.write()
