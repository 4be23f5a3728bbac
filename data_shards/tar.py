"""What a tar shard holds and where, found without believing it: damage and hostile names are errors."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from dist_train.errors import UserError

BLOCK = 512


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into (key, suffix) at the first dot of its basename, as webdataset does.

    Returns None for what webdataset ignores too: a name without a dot, or that begins with one.
    """
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    if not stem or not dot or not suffix:
        return None
    return str(path.with_name(stem)), suffix.lower()


def members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield (key, suffix, offset, size) for each file in the tar at `path`, in the order of the archive.

    Python's tarfile takes a damaged header after the first for the end of the archive. So what follows the last member
    must be zeros up to the end of the file, at least the two blocks that close every tar.
    """
    length = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                where = f"{path}: '{member.name}' at byte {member.offset}"
                size = member.size if member.isreg() else 0
                if member.offset < end or size < 0:
                    raise UserError(f"{where}: the header is damaged")
                if member.offset_data + size > length:
                    raise UserError(
                        f"{where}: needs {size} bytes, the file ends after {length - member.offset_data}: "
                        "the shard is truncated"
                    )
                end = member.offset_data + -(-size // BLOCK) * BLOCK
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{where}: is a link or a device; a shard holds plain files")
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts or "\0" in member.name:
                    raise UserError(f"{where}: leads out of the shard")
                named = split_name(member.name)
                if named is not None:
                    yield *named, member.offset_data, size
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has read
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, IndexError) as error:
        raise UserError(f"{path}: not a readable tar after byte {end}: {error}") from error
    with path.open("rb") as file:
        file.seek(end)
        for offset in range(end, length, 1 << 20):
            rest = file.read(1 << 20)
            if rest.count(0) != len(rest):
                raise UserError(f"{path}: the header at byte {offset} or after it is damaged")
    if length - end < 2 * BLOCK:
        raise UserError(
            f"{path}: truncated at byte {length}: the two zero blocks that end a tar are missing"
        )


def scan(path: Path, suffixes: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Return (suffixes, table) of one shard; the table is int64 (samples, suffixes, 2) of (offset, size).

    Every sample must have the same suffixes: those given, or else those of the first sample, sorted.
    """
    rows: list[list[tuple[int, int]]] = []
    seen: set[str] = set()
    current: dict[str, tuple[int, int]] = {}
    current_key: str | None = None

    def close() -> None:
        nonlocal suffixes
        suffixes = suffixes or sorted(current)
        if sorted(current) != suffixes:
            missing = sorted(set(suffixes) - set(current))
            what = f"has no '{missing[0]}'" if missing else f"has {sorted(current)}"
            at = min(offset for offset, _ in current.values())
            raise UserError(
                f"{path}: sample '{current_key}' at byte {at} {what}; every sample needs {suffixes}"
            )
        rows.append([current[suffix] for suffix in suffixes])

    for key, suffix, offset, size in members(path):
        if key != current_key:
            if current:
                close()
            if key in seen:
                raise UserError(
                    f"{path}: sample '{key}' appears again at byte {offset}: its files must stand together, once"
                )
            seen.add(key)
            current, current_key = {}, key
        if suffix in current:
            raise UserError(
                f"{path}: sample '{key}' has two files '{suffix}', again at byte {offset}"
            )
        current[suffix] = (offset, size)
    if not current:
        raise UserError(f"{path}: holds no sample (names are KEY.SUFFIX, as webdataset has them)")
    close()
    assert suffixes is not None
    return suffixes, np.array(rows, dtype=np.int64).reshape(len(rows), len(suffixes), 2)


def key_at(path: Path, start: int, offset: int) -> str:
    """Return the key of the member whose data begin at byte `offset`, reading headers from byte `start`."""
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                named = split_name(member.name)
                if member.offset_data == offset and named is not None:
                    return named[0]
    raise UserError(f"{path}: no file begins at byte {offset}: the shard is not the one indexed")
