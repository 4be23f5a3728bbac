"""Files of elsewhere in a folder of this machine: each fetched once for all its processes, the oldest go first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dist_train.data_shards.remote import Patience, download
from dist_train.errors import UserError


@dataclass(frozen=True)
class Cache:
    """At most `size` bytes of files in `folder`, named after their SHA-256, which they had when they came.

    Any number of processes share it. A file that goes while it is mapped stays readable for those who mapped it.
    """

    folder: Path
    size: int
    patience: Patience = field(default_factory=Patience)

    def path(self, address: str, sha256: str, size: int) -> Path:
        """The file at `address`, fetched first if it is not there; others that want it meanwhile wait for it."""
        target = self.folder / sha256
        if self._is_there(target, size):
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{sha256}.lock"):
            if not self._is_there(target, size):
                self._fetch(address, target, size)
        return target

    def _is_there(self, target: Path, size: int) -> bool:
        try:
            if target.stat().st_size != size:
                return False
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, address: str, target: Path, size: int) -> None:
        part = target.with_name(f"{target.name}.part")
        try:
            with part.open("wb") as file:
                self._make_room(part, size)
                download(address, file, size, target.name, self.patience)
            with _locked(
                self.folder / "room.lock"
            ):  # who makes room must not miss it between two names
                part.replace(target)
        except OSError as error:
            raise UserError(f"{part}: cannot be written: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: Path, size: int) -> None:
        """Let `part` have `size` bytes; what was used longest ago goes until all fits."""
        if size > self.size:
            raise UserError(
                f"data.cache.size: {self.size:,} bytes, less than one file of {size:,} needs"
            )
        with _locked(self.folder / "room.lock"):
            os.truncate(part, size)  # so that it counts from now on
            files = []
            for entry in os.scandir(self.folder):
                try:
                    if entry.is_file():
                        files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
                except FileNotFoundError:
                    continue
            room = self.size - sum(length for _, length, _ in files)
            for _, length, path in sorted(files):
                if room >= 0:
                    break
                under_way = path.endswith(".part") and (path == str(part) or _is_locked(path))
                if not under_way and not path.endswith(".lock"):
                    Path(path).unlink(missing_ok=True)
                    room += length


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the lock ends with its process."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile holds a copy of it
        os.close(lock)


def _is_locked(part: str) -> bool:
    """Whether someone still writes a part; its process may have been killed."""
    lock = os.open(f"{part.removesuffix('.part')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
