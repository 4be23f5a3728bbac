"""Files and folders that appear whole or not at all, whatever is killed when."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_train.errors import UserError, writing


def publish(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well.

    It has a fixed name, so that after a kill the next process finds what is done; a lock keeps it to one process at a
    time, the others wait. Where nothing was finished in it, it goes. UserError: `out` is there already and not empty.
    """
    folder = out.parent / f".{out.name}.packing"
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out}: exists already and is not an empty folder")
            yield folder
            os.fsync(lock)
            folder.rename(out)
        finally:
            if folder.is_dir() and not any(folder.glob("*.tar")):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


@contextmanager
def alone(folder: Path, advice: str = "") -> Iterator[None]:
    """One process at a time in a folder; the lock ends with its process. UserError, with `advice`: it cannot be."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}{advice}") from error


def _locked(folder: Path) -> int:
    """The folder, made where it is missing, opened and locked: the lock ends with the process."""
    while True:
        with suppress(FileExistsError):  # exist_ok would look again, and may find it gone
            folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process was done just now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir() and os.fstat(lock).st_ino == folder.stat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(lock)
            raise UserError(
                f"{folder}: cannot be locked ({error.strerror}); pack on another file system and move it"
            ) from error
        os.close(lock)  # what was waited for is not there any more
