"""`--on local`: the ranks of this machine, in the background, supervised as `train --ranks` does it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from dist_train.errors import UserError
from dist_train.launch.backend import Backend, Job, Status, travelling
from dist_train.run_directory import write_file

HELD, ENDED = "logs/job.pid", "logs/job.ended"


class Local(Backend):
    """One detached process that supervises the ranks. It holds a lock on HELD as long as it lives."""

    takes = frozenset({"nodes", "gpus_per_node", "ranks_per_node"})

    def __init__(self, supervisor: str = "dist_train.launch.local") -> None:
        self.supervisor = supervisor

    def check(self, job: Job, dry_run: bool) -> None:
        if job.spec.nodes != 1:
            raise UserError(
                f"--nodes {job.spec.nodes}: --on {job.spec.on} has this one machine, expected 1"
            )

    def render(self, job: Job) -> dict[str, str]:
        return {"logs/job.txt": shlex.join(self._command(job)) + "\n"}

    def submit(self, job: Job) -> str:
        environ = {name: os.environ[name] for name in travelling(job.spec.env)} | job.environ()
        held = os.open(job.run_dir / HELD, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(held, 0)
            (job.run_dir / ENDED).unlink(missing_ok=True)
            with job.log.open("ab") as log:
                process = subprocess.Popen(
                    self._command(job),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=job.run_dir,
                    env=environ,
                    pass_fds=(held,),  # and with it the lock
                    start_new_session=True,
                )
            os.write(held, f"{process.pid}\n".encode())
        except BlockingIOError:
            raise UserError(f"{job.run_dir}: is running already") from None
        finally:
            os.close(held)
        return str(process.pid)

    def status(self, job: Job) -> Status:
        if _pid(job) is not None:
            return Status("running", f"process {job.id}")
        file = job.run_dir / ENDED
        if not file.is_file():
            return Status("failed", "ended without a word: killed, or this machine went down")
        code = json.loads(file.read_text())["code"]
        state = {0: "done", 75: "interrupted", 130: "interrupted"}.get(code, "failed")
        return Status(state, f"exit code {code}")

    def cancel(self, job: Job) -> None:
        pid = _pid(job)
        if pid is None:
            raise UserError(f"{job.run_dir}: is not running ({self.status(job).state})")
        os.kill(pid, signal.SIGTERM)

    def _command(self, job: Job) -> list[str]:
        return [job.python, "-m", self.supervisor, str(job.run_dir)]


def _pid(job: Job) -> int | None:
    """The supervising process, None when nobody holds the lock."""
    try:
        held = os.open(job.run_dir / HELD, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(held, 32) or 0) or None
    finally:
        os.close(held)
    return None


def main(run_dir: str) -> int:
    """Run a submitted job to its end, and write down with which code it ended."""
    from dist_train.launch.cli import main as command_line

    job = Job.read(Path(run_dir))
    code = command_line(
        [
            *job.train_command()[3:],
            *("--ranks", str(job.spec.ranks)),
            *("--max-restarts", str(job.spec.max_restarts)),
        ]
    )
    return ended(job, code)


def ended(job: Job, code: int) -> int:
    """Write down with which code a job ended; returns it."""
    write_file(job.run_dir / ENDED, json.dumps({"code": code}).encode())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
