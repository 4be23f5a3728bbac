"""After `srun` in a batch script: again here, back into the queue, or the end.

`python -m dist_train.launch.requeue RUN_DIR CODE` exits with 0 when the ranks are to start again in this allocation.
An interruption (exit code 75) goes back into the queue: by Slurm itself where it has preempted the job, else by us. A
failure starts again here; but where Slurm cannot end what failed, because a node of it went down, in the queue too. All
of it only as long as starts lead on (`max_restarts`).
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

from dist_train.data_shards.publish import alone
from dist_train.errors import UserError
from dist_train.launch.backend import RECORD, Job
from dist_train.launch.slurm import ENDED, SCRIPT, slurm
from dist_train.restarts import may_restart
from dist_train.run_directory import write_file

AGAIN, LEAVE = 0, 1
DONE, MISTAKE = 0, 2
INTERRUPTIONS = (75, 128 + 15, 128 + 12)
"""Saved; or ended by SIGTERM or SIGUSR2 before there was anything to save."""
PATIENCE = 10.0
"""Seconds that Slurm may take to end a step whose tasks have ended."""


def decide(run_dir: Path, code: int) -> int:
    """AGAIN or LEAVE, after ranks that ended with `code`."""
    write_file(run_dir / ENDED, json.dumps({"code": code}).encode())
    if code in (DONE, MISTAKE):
        return LEAVE
    if not _is_ours():
        _say(f"exit code {code}: Slurm has ended this job; whether it starts again is not for us")
        return LEAVE
    folder = run_dir if (run_dir / RECORD).is_file() else run_dir.parent  # of an array's member
    job = Job.read(folder)
    if not may_restart(run_dir, job.spec.max_restarts):
        _say(
            f"exit code {code}: {job.spec.max_restarts} starts in a row made no checkpoint: the end"
        )
        return LEAVE
    if code not in INTERRUPTIONS:
        if not _holds_a_step():
            _say(f"exit code {code}: starting again from the last checkpoint")
            return AGAIN
        _say(f"exit code {code}: Slurm cannot end a task, its node may be down")
    _requeue(job)
    return LEAVE


def _holds_a_step() -> bool:
    """Whether a step of this job does not end, so that the next `srun` here would wait for ever: a node that went down
    and came back before Slurm missed it knows nothing of the step, and says nothing."""
    command = ["squeue", "--noheader", "--steps", "--format=%i"]
    deadline = time.monotonic() + PATIENCE
    while True:
        steps = slurm(*command, f"--jobs={os.environ['SLURM_JOB_ID']}").split()
        if not any(step.rpartition(".")[2].isdigit() for step in steps):
            return False
        if time.monotonic() > deadline:
            return True
        time.sleep(1)


def _is_ours() -> bool:
    """Whether Slurm still runs this very start of the job, and has neither cancelled nor requeued it."""
    shown = slurm("scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"])
    state = re.search(r"\bJobState=(\w+)", shown)
    restarts = re.search(r"\bRestarts=(\d+)", shown)
    before = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return (
        state is not None
        and state[1] == "RUNNING"
        and (restarts is None or int(restarts[1]) == before)
    )


def _requeue(job: Job) -> None:
    """Back into the queue; where Slurm refuses that, as a new job that waits for the end of this one."""
    mine = os.environ["SLURM_JOB_ID"]
    try:
        slurm("scontrol", "requeue", mine)
        _say("interrupted: back in the queue")
    except UserError as refusal:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        arguments = [f"--dependency=afterany:{mine}", *([f"--array={task}"] if task else [])]
        script = str(job.run_dir / SCRIPT)
        new = slurm("sbatch", "--parsable", *arguments, script).partition(";")[0].strip()
        with alone(job.run_dir):  # other members of an array may be refused in the same moment
            job = Job.read(job.run_dir)
            job.id = f"{job.id},{new}"
            job.write()
        _say(f"interrupted: {refusal}; so job {new} goes on after this one")


def _say(line: str) -> None:
    sys.stderr.write(f"dist-train: {line}\n")


if __name__ == "__main__":
    sys.exit(decide(Path(sys.argv[1]), int(sys.argv[2])))
