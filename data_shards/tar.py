"""What a tar shard holds and where, found without believing it: damage and hostile names are errors."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from dist_train.errors import UserError

BLOCK = 512
TEMPLATE = bytearray(tarfile.TarInfo("").tobuf(tarfile.PAX_FORMAT))
TEMPLATE[124:135] = bytes(11)
TEMPLATE[148:156] = b" " * 8
TEMPLATE_SUM = sum(TEMPLATE)
Lost = list[tuple[int | None, str]]
"""(how many samples, None where nobody can know; why)"""


def padded(size: int) -> int:
    """How many bytes a content of `size` takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The header of a plain file, as `tarfile` writes it; for a short ASCII name put together here, for speed."""
    encoded = name.encode()
    if len(encoded) > 100 or not name.isascii() or size >= 8 << 30:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.PAX_FORMAT)
    digits = b"%011o" % size
    check = TEMPLATE_SUM + sum(encoded) + sum(digits)
    block = bytearray(TEMPLATE)
    block[: len(encoded)] = encoded
    block[124:135] = digits
    block[148:156] = b"%06o\0 " % check
    return bytes(block)


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
                end = member.offset_data + padded(size)
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


def scan(
    path: Path, suffixes: list[str] | None = None, lost: Lost | None = None
) -> tuple[list[str] | None, np.ndarray]:
    """Return (suffixes, table) of one shard; the table is int64 (samples, suffixes, 2) of (offset, size).

    Every sample must have the same suffixes: those given, or else those of the first sample, sorted. What is wrong is a
    UserError; where `lost` is given it is noted there instead, and the samples concerned have no row in the table.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    seen: set[str] = set()
    wrong: dict[str, str] = {}

    def note(key: str, reason: str) -> None:
        if lost is None:
            raise UserError(f"{path}: {reason}")
        wrong.setdefault(key, f"{path}: {reason}")

    try:
        for key, suffix, offset, size in members(path):
            if not samples or key != samples[-1][0]:
                if key in seen:
                    note(
                        key,
                        f"sample '{key}' appears again at byte {offset}: its files must stand together, once",
                    )
                seen.add(key)
                samples.append((key, {}))
            if suffix in samples[-1][1]:
                note(key, f"sample '{key}' has two files '{suffix}', again at byte {offset}")
            samples[-1][1][suffix] = (offset, size)
    except UserError as error:
        if lost is None:
            raise
        lost.append((None, str(error)))
    if not samples:
        note("", "holds no sample (names are KEY.SUFFIX, as webdataset has them)")
        return suffixes, np.zeros((0, 0, 2), np.int64)
    if suffixes is None:
        counts = Counter(tuple(sorted(fields)) for _, fields in samples)
        suffixes = sorted(samples[0][1]) if lost is None else list(counts.most_common(1)[0][0])
    for key, fields in samples:
        if sorted(fields) != suffixes:
            missing = sorted(set(suffixes) - set(fields))
            what = f"has no '{missing[0]}'" if missing else f"has {sorted(fields)}"
            at = min(offset for offset, _ in fields.values())
            note(key, f"sample '{key}' at byte {at} {what}; every sample needs {suffixes}")
    if lost is not None and wrong:
        lost.append((len(wrong), "; ".join(wrong.values())))
    rows = [[fields[suffix] for suffix in suffixes] for key, fields in samples if key not in wrong]
    return suffixes, np.array(rows, dtype=np.int64).reshape(len(rows), len(suffixes), 2)


def keys(path: Path) -> Iterator[str]:
    """The keys of a shard's samples, in order."""
    last = None
    for key, _, _, _ in members(path):
        if key != last:
            yield key
        last = key


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
