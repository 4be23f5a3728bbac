"""`--on slurm`: a batch script that one can read, and what Slurm's commands say about the job.

The only file that knows `sbatch`, `squeue` and `scancel`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import dist_train
from dist_train.errors import UserError, nearest
from dist_train.launch.backend import Backend, Job, Status, travelling
from dist_train.settings import short

TEMPLATE = Path(dist_train.__file__).parent / "slurm" / "train.sbatch"
SCRIPT, ENDED = "job.sbatch", "logs/job.ended"
PATIENCE = 60
"""Seconds that a command of Slurm may take."""
OPTIONS = (
    *("partition", "account", "qos", "constraint", "time", "mem", "array", "dependency"),
    "mail_user",
)
STATES = {
    "waiting": ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD"),
    "running": ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "STOPPED"),
    "failed": ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
    "interrupted": ("TIMEOUT", "PREEMPTED"),
    "cancelled": ("CANCELLED", "REVOKED"),
    "done": ("COMPLETED",),
}


class Slurm(Backend):
    """One job of `sbatch`, or an array of them; one task of `srun` a rank."""

    takes = frozenset(
        {"nodes", "gpus_per_node", "ranks_per_node", "cpus_per_rank", "setup", "notice", "sbatch"}
        | {"each", "container_image", "container_mounts", *OPTIONS}
    )

    def check(self, job: Job, dry_run: bool) -> None:
        script = self.render(job)[SCRIPT]
        if not dry_run:
            slurm("sbatch", "--test-only", content=script)

    def render(self, job: Job) -> dict[str, str]:
        spec = job.spec
        containers = {"image": spec.container_image, "mounts": spec.container_mounts}
        words = [f"--container-{key}={value}" for key, value in containers.items() if value]
        return {
            SCRIPT: _template().render(
                name=job.name,
                options=options(job),
                setup=spec.setup,
                python=job.python,
                run_dir=str(job.run_dir),
                array=spec.array,
                until=job.until,
                environ=sorted(job.environ().items()),
                container="".join(f"{shlex.quote(word)} " for word in words),
            )
        }

    def submit(self, job: Job) -> str:
        (job.run_dir / ENDED).unlink(missing_ok=True)
        return slurm("sbatch", "--parsable", str(job.run_dir / SCRIPT)).partition(";")[0].strip()

    def status(self, job: Job) -> Status:
        found = states(job.id)
        if not found:
            return _from_notes(job)
        counts = Counter(_state(one, code) for one, code in found)
        order = ("running", "waiting", "failed", "cancelled", "interrupted", "unknown", "done")
        detail = f"job {job.id}: {', '.join(sorted({one for one, _ in found}))}"
        if len(found) > 1:
            detail += f" ({', '.join(f'{n} {state}' for state, n in counts.items())})"
        return Status(next(state for state in order if counts[state]), detail)

    def cancel(self, job: Job) -> None:
        slurm("scancel", *job.id.split(","))


@cache
def _template() -> Any:
    import jinja2

    page = jinja2.Environment(  # a script is no page of HTML: `word` and `directive` quote
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {"word": shlex.quote, "directive": directive}
    return page.from_string(TEMPLATE.read_text(encoding="utf-8"))


def options(job: Job) -> list[tuple[str, Any]]:
    """The options of sbatch, in the order of the script. Raises UserError."""
    spec = job.spec
    exported = ",".join(travelling(spec.env))
    found: dict[str, Any] = {
        "job-name": job.name,
        "nodes": spec.nodes,
        "ntasks-per-node": spec.local_ranks,
        "gpus-per-node": spec.gpus_per_node or None,
        "cpus-per-task": spec.cpus_per_rank,
        "output": str(job.log).replace("%", "%%"),
        "open-mode": "append",
        "signal": f"USR2@{spec.notice}",
        "export": exported or "NIL",
        **{name.replace("_", "-"): getattr(spec, name) for name in OPTIONS},
    }
    if spec.array:
        found["output"] = found["output"].removesuffix(".log") + "-%a.log"
    for name in spec.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(
                f"--env {short(name)}: expected the name of a variable, whose value travels"
            )
    for key in spec.sbatch:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise UserError(
                f"--sbatch {short(key)}: expected an option of sbatch, like exclusive=user"
            )
        if key in found or key in ("requeue", "no-requeue", "wrap", "parsable", "test-only"):
            raise UserError(f"--sbatch {key}: dist-train sets it{nearest(key, Slurm.takes)}")
    given = {key: value for key, value in found.items() if value is not None}
    return [*given.items(), ("requeue", None), *spec.sbatch.items()]


def directive(value: Any) -> str:
    """A value as Slurm reads it in an #SBATCH line; UserError for what would not arrive as it is."""
    text = str(value)
    if re.search(r"[\x00-\x1f\x7f\"'\\#]", text) or not text.isprintable():
        raise UserError(
            f"{short(text)}: expected no quote, '#', backslash or control character, which #SBATCH lines cannot hold"
        )
    return text if re.fullmatch(r"[\w@%+=:,./&|*()\[\]!{}~^-]+", text, re.ASCII) else f'"{text}"'


def slurm(command: str, *arguments: str, content: str | None = None) -> str:
    """What a command of Slurm prints; UserError with its own words when it fails."""
    try:
        done = subprocess.run(
            [command, *arguments], input=content, capture_output=True, text=True, timeout=PATIENCE
        )
    except FileNotFoundError:
        raise UserError(
            f"--on slurm: no {command} on this machine, expected Slurm's commands"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command}: no answer in {PATIENCE} s; is slurmctld up?") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{command}: {'; '.join(lines) or f'exit code {done.returncode}'}")
    return done.stdout


def states(ids: str) -> list[tuple[str, int]]:
    """(state, exit code) of each job or member that Slurm still knows; it forgets them some minutes after their end."""
    try:
        found = slurm(
            "squeue",
            "--noheader",
            "--states=all",
            "--array",
            f"--jobs={ids}",
            "-O",
            "State:32,exit_code:16",
        )
    except UserError as error:
        if "Invalid job id" in str(error):
            return []
        raise
    pairs = [line.split() for line in found.splitlines()]
    return [(pair[0], int(pair[1]) if len(pair) > 1 else 0) for pair in pairs if pair]


def _state(name: str, code: int) -> str:
    state = next((state for state, names in STATES.items() if name in names), "unknown")
    return "interrupted" if state == "failed" and code in (75, 75 << 8) else state


def _from_notes(job: Job) -> Status:
    """From what the script noted, where Slurm has forgotten the job."""
    codes = []
    for run_dir in job.run_dirs:
        if not (run_dir / ENDED).is_file():
            return Status(
                "unknown", f"job {job.id}: Slurm has forgotten it, and {run_dir} has no {ENDED}"
            )
        codes.append(json.loads((run_dir / ENDED).read_text())["code"])
    worst = max(codes)
    return Status({0: "done", 75: "interrupted"}.get(worst, "failed"), f"exit code {worst}")
