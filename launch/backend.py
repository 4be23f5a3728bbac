"""What every place to run at can do: check, render, submit, and say, show and end what it was given."""

from __future__ import annotations

import codecs
import importlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_train.errors import UserError, nearest
from dist_train.launch.spec import Spec
from dist_train.run_directory import write_file

BACKENDS = {
    "accelerate": "dist_train.launch.accelerate:Accelerate",
    "local": "dist_train.launch.local:Local",
    "slurm": "dist_train.launch.slurm:Slurm",
    "ray": "dist_train.launch.ray:Ray",
}
"""{name: class}. The modules import nothing foreign before a method needs it: --dry-run is quick."""
RECORD = "launch.json"


@dataclass
class Job:
    """One launched run. `launch.json` in its run directory holds it, so that later commands find it again.

    Attributes:
        name: the recipe's. run_dir: absolute. project_root: where the recipe's project lies.
        code: the snapshot that the ranks import, None before there is one. id: the backend's own name for the job.
        until: where the run is to pause, as a duration; None for its end.
    """

    spec: Spec
    name: str
    run_dir: Path
    project_root: Path
    code: Path | None = None
    python: str = sys.executable
    id: str = ""
    submitted: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    until: str | None = None

    @property
    def log(self) -> Path:
        """Where the job's output goes."""
        return self.run_dir / "logs" / "job.log"

    @property
    def logs(self) -> list[Path]:
        """The files that the job's output goes to: one, or one for each member of an array."""
        return [self.run_dir / "logs" / f"job-{n}.log" for n in self.spec.members] or [self.log]

    def member(self, number: int) -> Path:
        """The run directory of a member of an array."""
        return self.run_dir / f"member-{number}"

    @property
    def run_dirs(self) -> list[Path]:
        """The directories that ranks write to: the job's own, or those of its members."""
        return [self.member(number) for number in self.spec.members] or [self.run_dir]

    def train_command(self, run_dir: Path | None = None) -> list[str]:
        """What every rank runs; RANK, WORLD_SIZE and so on tell it its place."""
        path = str(run_dir or self.run_dir)
        return [
            *(self.python, "-m", "dist_train", "train", path),
            *("--run-dir", path, "--resume", "auto"),
            *(("--until", self.until) if self.until else ()),
        ]

    def environ(self) -> dict[str, str]:
        """What a rank needs in its environment to import the snapshot instead of what lies where it was launched."""
        if self.code is None:
            return {}
        return {
            "PYTHONPATH": str(self.code),
            "PYTHONSAFEPATH": "1",  # or the folder that it was launched in would come first
            "DIST_TRAIN_CODE": str(self.code / "project"),
        }

    def write(self) -> None:
        record = asdict(self) | {"spec": self.spec.as_dict()}
        content = json.dumps(record, indent=2, default=str).encode()
        write_file(self.run_dir / RECORD, content)

    @classmethod
    def read(cls, run_dir: Path) -> Job:
        file = run_dir / RECORD
        if not file.is_file():
            raise UserError(f"{run_dir}: was not launched (it has no {RECORD})")
        record = json.loads(file.read_text(encoding="utf-8"))
        for name in ("run_dir", "project_root", "code"):
            record[name] = None if record[name] is None else Path(record[name])
        return cls(**record | {"spec": Spec(**record["spec"]), "run_dir": run_dir.resolve()})


@dataclass(frozen=True)
class Status:
    """Where a job is. `state` is waiting, running, done, failed, interrupted, cancelled or unknown."""

    state: str
    detail: str = ""


class Backend(ABC):
    """A place to run at. Final subclasses live in files of their own, named in BACKENDS.

    Attributes:
        takes: the settings of Spec that mean something here, beside `on`, `profile`, `gpu`, `env` and `max_restarts`.
    """

    takes: frozenset[str] = frozenset()

    @abstractmethod
    def check(self, job: Job, dry_run: bool) -> None:
        """Raise UserError for what can be known to fail; a dry run asks nobody else."""

    @abstractmethod
    def render(self, job: Job) -> dict[str, str]:
        """The files to write into the run directory, {relative path: content}; the first is what is submitted."""

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Start or queue what `render` gave, which lies in the run directory now; return the job's id."""

    @abstractmethod
    def status(self, job: Job) -> Status:
        """Where the job is."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Ask the job to save and end; it is not started again."""

    def logs(self, job: Job) -> Iterator[str]:
        """What the job has printed so far; asked again, what has come since."""
        files = [follow(path) for path in job.logs]
        while True:
            yield "".join(map(next, files))


def follow(path: Path) -> Iterator[str]:
    """The content of a file, then, each time that the iterator is asked again, what was added since ("" if nothing)."""
    position, decoder = 0, codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        text = ""
        if path.is_file():
            with path.open("rb") as file:
                file.seek(position)
                content = file.read(1 << 20)
            position += len(content)
            text = decoder.decode(content)  # a character may be cut in two
        yield text


def backend(name: str) -> Backend:
    """The backend of this name; UserError with the nearest one."""
    if name not in BACKENDS:
        raise UserError(
            f"--on {name}: expected one of {', '.join(BACKENDS)}{nearest(name, BACKENDS)}"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def travelling(names: list[str]) -> list[str]:
    """Those of the names that have a value here, with the trackers' and stores' own."""
    return sorted({name for name in (*ALWAYS, *names) if name in os.environ})


ALWAYS = (
    *("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "DIST_TRAIN_DATA", "DIST_TRAIN_TIMEOUT"),
    *(
        "WANDB_API_KEY",
        "WANDB_BASE_URL",
        "WANDB_ENTITY",
        "WANDB_PROJECT",
        "WANDB_MODE",
        "WANDB_RUN_GROUP",
    ),
    *(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_REGION",
    ),
    *("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "HF_HOME", "HF_TOKEN"),
)
"""Variables whose values travel to every job, where they have one. Any other is named by --env."""
