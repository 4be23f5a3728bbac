"""Programs of this machine that fetch data: run without a shell, with a limit of time, and one line when they fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from dist_train.errors import UserError

MINUTES = 10


def run_tool(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run `command` in `folder`; returns what it printed. UserError: no such program, or it failed."""
    if shutil.which(command[0]) is None:
        raise UserError(f"needs {command[0]}, which this machine does not have")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60 * MINUTES,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command)}: no end after {MINUTES} minutes") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise UserError(f"{' '.join(command)}: {said[-1]}")
    return done.stdout
