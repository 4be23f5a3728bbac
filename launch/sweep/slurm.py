"""`sweep --on slurm`: a job a trial, at most so many in the queue at once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from dist_train.errors import UserError
from dist_train.launch.backend import RECORD, Job
from dist_train.launch.slurm import ENDED
from dist_train.launch.slurm import Slurm as Queue
from dist_train.launch.spec import Spec
from dist_train.launch.sweep.conduct import End, Place, Task
from dist_train.launch.sweep.jobs import job_of, submitted, take_code
from dist_train.launch.sweep.plan import Plan
from dist_train.restarts import begin_to_count
from dist_train.run_directory import write_file

LOOK, ASK = 0.5, 10.0
"""Seconds between two looks at what the jobs have noted, and between two questions to Slurm about all of them."""
OPEN = ("waiting", "running")

log = logging.getLogger(__name__)


class Slurm(Place):
    """Trials are jobs as `launch --on slurm` makes them: preempted and requeued by themselves. They outlive a sweep
    that is killed, which finds them again; a sweep that is told to end ends them."""

    def __init__(self, plan: Plan, spec: Spec, path: Path) -> None:
        take_code(plan, path)
        self.spec, self.path = spec, path
        self.queue = Queue()
        self._jobs: list[tuple[Task, Job]] = []
        self._asked = time.monotonic()
        self._told = self._cancelled = False

    @property
    def tasks(self) -> list[Task]:
        return [task for task, _ in self._jobs]

    def start(self, task: Task) -> None:
        self._jobs.append((task, self._left(task) or self._submitted(task)))

    def ended(self) -> list[End]:
        if self._told and not self._cancelled:
            self._cancelled = True
            for _, job in self._jobs:
                self.queue.cancel(job)
        time.sleep(LOOK)
        everyone = time.monotonic() - self._asked > ASK
        if everyone:
            self._asked = time.monotonic()
        found = []
        for task, job in list(self._jobs):
            if everyone or (job.run_dir / ENDED).is_file():
                found += self._looked_at(task, job)
        return found

    def stop(self, number: int) -> None:
        self._told = True

    def close(self) -> None:
        for _, job in self._jobs:
            self.queue.cancel(job)
        self._jobs.clear()

    def _left(self, task: Task) -> Job | None:
        """The job of this very leg that an earlier start of the sweep has submitted, if it runs or is done."""
        if not (task.run_dir / RECORD).is_file():
            return None
        job = Job.read(task.run_dir)
        if not job.id or job.until != task.until:
            return None
        return job if self.queue.status(job).state in (*OPEN, "done") else None

    def _submitted(self, task: Task) -> Job:
        job = job_of(task, self.spec, self.path)
        for name, content in self.queue.render(job).items():
            write_file(job.run_dir / name, content.encode())
        begin_to_count(job.run_dir)
        submitted(job, "")  # the job itself reads its record
        submitted(job, self.queue.submit(job))
        return job

    def _looked_at(self, task: Task, job: Job) -> list[End]:
        """What became of a job; nothing while it waits or runs."""
        job.id = Job.read(task.run_dir).id  # one that Slurm refused to requeue has a successor
        try:
            status = self.queue.status(job)
        except UserError as refusal:  # slurmctld is away: jobs go on without it
            log.warning("trial %d: %s", task.leg.trial, refusal)
            return []
        if status.state in OPEN:
            return []
        self._jobs.remove((task, job))
        if status.state == "done":
            return [End(task)]
        error = f"{status.state}: {status.detail}; see {job.log}"
        return [End(task, error=error, cut_off=self._told)]
