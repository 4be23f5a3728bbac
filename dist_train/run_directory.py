"""A run directory: everything a run leaves behind, and the only truth about it (law 8).

recipe.yaml        the resolved recipe      command.txt     one line a start
environment.json   what it ran on           metrics.jsonl   one JSON object a logged step
logs/rank-N.log    what a rank printed      lock            held while a run writes here
checkpoints/  samples/  plots/
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError

RUNS = Path("runs")
ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"  # base32, lower case
PACKAGES = ("torch", "numpy", "deepspeed", "accelerate", "safetensors", "dist-train")
VARIABLES = re.compile(
    r"(CUDA_VISIBLE_DEVICES|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE"
    r"|MASTER_ADDR|MASTER_PORT|SLURM_JOB_ID|SLURM_JOB_NUM_NODES|SLURM_NTASKS|SLURM_RESTART_COUNT|WANDB_MODE"
    r"|(OMP|MKL|NCCL|GLOO|TORCH|PYTORCH|ACCELERATE|DIST_TRAIN)_\w+)"
)
"""The environment variables worth remembering. Everything else stays out of environment.json."""
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
MAX_DIFF_BYTES = 256 * 1024


class RunDirectory:
    """One run's folder: `create` and `create_at` make a new one, `open` takes an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.environment = path / "environment.json"
        self.command = path / "command.txt"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.plots = path / "plots"
        self.logs = path / "logs"
        self._rows: int | None = None
        self._lock: int | None = None

    @classmethod
    def create(cls, root: Path | str, project: str, name: str) -> RunDirectory:
        """Make `root/project/name-id/` with a fresh id of six characters."""
        while True:
            with contextlib.suppress(FileExistsError):
                return cls._make(cls.fresh(root, project, name))

    @staticmethod
    def fresh(root: Path | str, project: str, name: str) -> Path:
        """A path that `create` might take."""
        for what, value in (("project", project), ("name", name)):
            if (
                not value
                or value.startswith(".")
                or re.search(r"[/\\\x00-\x1f]", value)
                or len(value) > 200
            ):
                raise UserError(f"{what}: {value!r} cannot be the name of a folder")
        return (
            Path(root)
            / project
            / f"{name}-{''.join(secrets.choice(ID_ALPHABET) for _ in range(6))}"
        )

    @classmethod
    def create_at(cls, path: Path | str) -> RunDirectory:
        """Make exactly `path`, which must not exist yet or be empty."""
        path = Path(path)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        try:
            return cls._make(path)
        except FileExistsError:
            raise UserError(
                f"{path} exists already: give another --run-dir, or --resume auto to go on with it"
            ) from None

    @classmethod
    def _make(cls, path: Path) -> RunDirectory:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise
        except OSError as error:
            raise UserError(f"--run-dir: {error.filename}: {error.strerror}") from error
        directory = cls(path)
        for folder in (directory.checkpoints, directory.samples, directory.plots, directory.logs):
            folder.mkdir()
        return directory

    @classmethod
    def open(cls, path: Path | str) -> RunDirectory:
        """Take an existing run directory; UserError when `path` is none."""
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} is not a run directory (it has no recipe.yaml)")
        return cls(path)

    # --------------------------------------------------------------------------------------------
    # The log

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one row to metrics.jsonl in a single write: a kill tears at most the last line.

        A figure that is not finite is written as null, beside `name/nonfinite`: nan, inf or -inf.
        """
        if self._rows is None:
            self._rows = os.open(self.metrics, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            content = self.metrics.read_bytes()
            os.ftruncate(self._rows, content.rfind(b"\n") + 1)
        try:
            line = _ENCODER.encode(row)
        except ValueError:  # rare, and to look for it takes as long as to write
            line = _ENCODER.encode(_finite(row))
        os.write(self._rows, f"{line}\n".encode())

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line that a kill tore is ignored."""
        return [row for _, row in self._lines()]

    def cut(self, step: int) -> None:
        """Drop the rows after `step`, at once or not at all."""
        self.close()
        kept = b"".join(line for line, row in self._lines() if row["step"] <= step)
        write_file(self.metrics, kept)

    def _lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.metrics.exists():
            return
        lines = self.metrics.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.metrics}:{number}: not a row of metrics: {line[:60]!r}"
                ) from None
            yield line + b"\n", row

    def close(self) -> None:
        """Close metrics.jsonl; the next row opens it again."""
        if self._rows is not None:
            os.close(self._rows)
            self._rows = None

    # --------------------------------------------------------------------------------------------
    # What ran, how and where

    def write_recipe(self, yaml: str) -> None:
        """Write the resolved recipe."""
        write_file(self.recipe, yaml.encode())

    def write_command(self, argv: Sequence[str] = sys.argv) -> None:
        """Add the command line of this start, without secrets."""
        with self.command.open("a", encoding="utf-8") as file:
            file.write(shlex.join(scrub_command(argv)) + "\n")

    def write_environment(self, found: Mapping[str, Any]) -> None:
        """Write what `environment()` found, keeping what earlier starts found under `earlier`."""
        earlier: list[dict[str, Any]] = []
        if self.environment.exists():
            last = json.loads(self.environment.read_text(encoding="utf-8"))
            earlier = [*last.pop("earlier", []), last]
        content = {**found, "earlier": earlier}
        write_file(self.environment, json.dumps(content, indent=2).encode())

    def environment_changes(self, found: Mapping[str, Any]) -> list[str]:
        """What "bit for bit" depends on and has changed since the last start: `ranks 2 -> 1`."""
        if not self.environment.exists():
            return []
        last = json.loads(self.environment.read_text(encoding="utf-8"))
        before, after = _exactness(last), _exactness(found)
        return [
            f"{name} {before.get(name)} -> {after.get(name)}"
            for name in sorted(before | after)
            if before.get(name) != after.get(name)
        ]

    # --------------------------------------------------------------------------------------------
    # One writer at a time

    def lock(self) -> None:
        """Claim the directory for this process; UserError names the one that has it.

        The kernel holds the lock and lets go of it when the process ends, however it ends: there
        is no stale lock to break. Where a file system has no locks, the run goes on without.
        """
        path = self.path / "lock"
        if path.resolve() in _LOCKED:
            raise UserError(f"{self.path} is being written by this very process")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1024).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{self.path} is being written by {holder or 'another process'}:"
                    " end that run first, or give another --run-dir"
                ) from None
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor
        _LOCKED.add(path.resolve())

    def unlock(self) -> None:
        """Let the next run have the directory."""
        if self._lock is not None:
            _LOCKED.discard((self.path / "lock").resolve())
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None


_LOCKED: set[Path] = set()
"""Locks of this process, which the kernel would give to it a second time."""


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader finds the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(temporary, flags, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in row.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        result[name] = value if finite else None
        if not finite:
            result[f"{name}/nonfinite"] = str(value)
    return result


def environment(
    *, device: str = "cpu", world_size: int = 1, threads: int = 1, folder: Path | str = "."
) -> dict[str, Any]:
    """Describe this start: versions, machine, ranks, git state of `folder`, a few variables.

    `device` is this rank's ("cpu", "cuda:0"), `threads` the number of threads a rank has. Secrets
    are scrubbed.
    """
    device_type = device.partition(":")[0]
    found: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpus": os.cpu_count(),
        "device": device_type,
        "world_size": world_size,
        "threads": threads,
        "git": git_state(Path(folder)),
        "variables": {
            name: scrub_text(value)
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not SECRET_NAME.search(name)
        },
    }
    if device_type == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
        found["packages"]["cuda"] = torch.version.cuda
    return found


def _exactness(found: Mapping[str, Any]) -> dict[str, Any]:
    machine = {
        name: found[name] for name in ("python", "device", "gpu", "threads") if name in found
    }
    return {**machine, "ranks": found.get("world_size"), **found.get("packages", {})}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and changes of tracked files (256 KiB at most); None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                timeout=10,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.decode(errors="replace") if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    diff = git("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color") or ""
    state: dict[str, Any] = {"commit": commit.strip(), "dirty": bool(diff)}
    if diff:
        state["diff"] = scrub_text(diff[:MAX_DIFF_BYTES])
        state["diff_cut"] = len(diff) > MAX_DIFF_BYTES
    return state


# ------------------------------------------------------------------------------------------------
# Secrets

SECRET_NAME = re.compile(
    r"(?i)(?<![a-z])(api_?key|key|token|secrets?|password|passwd|credentials?)(?![a-z])"
)
_USER_INFO = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SECRET_SHAPE = re.compile(
    r"\b(hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|wandb_v1_)[A-Za-z0-9_-]{12,}"
)
_ASSIGNED = re.compile(
    r"(?i)((?<![a-z])(?:api_?key|key|token|secrets?|password|passwd|credentials?)(?![a-z])\w*['\"]?\s*[:=]\s*)"
    r"('[^'\n]{4,}'|\"[^\"\n]{4,}\"|[\w+/.-]{16,})"
)


def scrub_text(text: str) -> str:
    """`text` with *** for user-info in URLs, for keys, and for what a secret's name is set to."""
    text = _USER_INFO.sub("***@", text)
    text = _SECRET_SHAPE.sub("***", text)
    return _ASSIGNED.sub(r"\1***", text)


def scrub_command(argv: Sequence[str]) -> list[str]:
    """A command line without secrets: of `--set wandb.api_key=X` and `--token X` the names stay."""
    scrubbed: list[str] = []
    hide_next = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if hide_next:
            scrubbed.append("***")
            hide_next = False
        elif equals and SECRET_NAME.search(name):
            scrubbed.append(f"{name}=***")
        else:
            scrubbed.append(scrub_text(argument))
            hide_next = (
                argument.startswith("-") and not equals and bool(SECRET_NAME.search(argument))
            )
    return scrubbed


def scrub(value: Any) -> Any:
    """A tree of JSON values with *** for the strings under a secret's name, the others scrubbed."""
    if isinstance(value, Mapping):
        return {
            name: "***" if isinstance(item, str) and SECRET_NAME.search(str(name)) else scrub(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value
