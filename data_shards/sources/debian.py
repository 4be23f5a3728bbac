"""Files out of Debian packages: downloaded and unpacked by Debian's own tools, without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dist_train.data_shards.sources.cache import cache_folder
from dist_train.errors import UserError

MINUTES = 10


def unpack_package(package: str, into: Path) -> Path:
    """Download `package` and unpack it in the folder `into`; returns the root of its tree. Needs no root rights."""
    into.mkdir(exist_ok=True)
    try:
        _run(["apt-get", "download", package], into)
    except UserError:  # this machine has no package lists, or old ones
        environment = private_lists()
        _run(["apt-get", "download", package], into, environment)
    root = into / "unpacked"
    for archive in sorted(into.glob("*.deb")):
        _run(["dpkg-deb", "-x", archive.name, root.name], into)
    return root


def private_lists(languages: tuple[str, ...] = ()) -> dict[str, str]:
    """Fetch package lists, and descriptions in these languages, into our cache; returns the environment for apt."""
    folder = cache_folder() / "debian"
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    wanted = " ".join(f'"{language}";' for language in languages) or '"none";'
    configuration = folder / "apt.conf"
    configuration.write_text(
        f'Dir::State::lists "{folder}/lists/";\n'
        f'Dir::Cache "{folder}/";\n'
        f"#clear Acquire::Languages;\nAcquire::Languages {{ {wanted} }};\n"
    )
    environment = {"APT_CONFIG": str(configuration)}
    _run(["apt-get", "update", "-q"], folder, environment)
    return environment


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(f"needs {command[0]}, which this machine does not have")
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(environment or {}), "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60 * MINUTES,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command)}: no end after {MINUTES} minutes") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise UserError(f"{' '.join(command)}: {said[-1]}")
