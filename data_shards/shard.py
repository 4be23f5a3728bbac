"""One tar shard, written whole or not at all, with its table of offsets and a journal for the next try."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import packed, tar
from dist_train.data_shards.decode import encode
from dist_train.data_shards.index import Shard, sha256, sidecar
from dist_train.data_shards.publish import publish
from dist_train.errors import UserError

Value = bytes | Path | np.ndarray
Sample = tuple[str, list[tuple[str, Value]]]
"""(key, [(suffix, content)]), the suffixes sorted"""


@dataclass
class Written:
    """A shard that is done, and the fields that it has."""

    shard: Shard
    suffixes: list[str]
    elements: packed.Elements


def prepare(suffix: str, value: Any) -> Value:
    """What is kept of a value until its shard is written: files stay on disk, arrays as they are, all else as bytes."""
    if isinstance(value, Path) or (isinstance(value, np.ndarray) and suffix.endswith("npy")):
        return value
    return encode(suffix, value)


def size_of(value: Value) -> int:
    """How many bytes the value has in a tar; of an array, nearly."""
    if isinstance(value, Path):
        try:
            return value.stat().st_size
        except OSError as error:
            raise UserError(f"{value}: {error.strerror}") from error
    return value.nbytes + 128 if isinstance(value, np.ndarray) else len(value)


def write(path: Path, samples: list[Sample], records: int = 0) -> Written:
    """Write a shard, or take the one that stands there if it was made of the same samples and is whole.

    With `records` that many samples share a block, see `packed`.
    """
    made_of = f"{records} {_fingerprint(samples)}"
    done = _finished(path, made_of)
    if done is not None:
        return done
    _journal(path).unlink(missing_ok=True)
    part = path.with_suffix(".tar.part")
    part.unlink(missing_ok=True)
    digest = hashlib.sha256()
    table: list[int] = []
    place = 0
    with part.open("xb", buffering=1 << 20) as file:
        for block, size in _blocks(samples, records):
            if size is not None:
                table += (place, size)
            file.write(block)
            digest.update(block)
            place += len(block)
        file.flush()
        os.fsync(file.fileno())
    suffixes = [suffix for suffix, _ in samples[0][1]]
    elements: packed.Elements = {}
    rows = np.array(table, np.int64).reshape(-1, len(table) // 2 if records else len(suffixes), 2)
    if records:
        names, scanned = tar.scan(part)
        assert names is not None
        suffixes, rows, elements = packed.expand(part, names, scanned)
    offsets = encode("npy", rows)
    publish(sidecar(path), offsets)
    part.replace(path)
    made = Shard(
        path.name,
        len(samples),
        place,
        digest.hexdigest(),
        hashlib.sha256(offsets).hexdigest(),
    )
    written = Written(made, suffixes, elements)
    journal = {"made_of": made_of, **dataclasses.asdict(written)}
    publish(_journal(path), json.dumps(journal).encode())
    return written


def remove_journals(folder: Path, files: set[str]) -> None:
    """Leave of the folder only the shards `files` and their sidecars: other settings may have left others."""
    keep = files | {sidecar(Path(file)).name for file in files}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def _journal(path: Path) -> Path:
    return path.with_suffix(".done.json")


def _finished(path: Path, made_of: str) -> Written | None:
    """The shard as an earlier try finished it, if it was made of the same and nothing has happened to it."""
    try:
        journal = json.loads(_journal(path).read_bytes())
        if journal["made_of"] != made_of:
            return None
        made = Shard(**journal["shard"])
        elements = {
            suffix: (dtype, shape) for suffix, (dtype, shape) in journal["elements"].items()
        }
        written = Written(made, journal["suffixes"], elements)
        whole = (made.sha256, made.offsets_sha256) == (sha256(path), sha256(sidecar(path)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return written if whole else None


def _fingerprint(samples: list[Sample]) -> str:
    """A digest of all that goes into a shard; of a file its path, size and time of change."""
    digest = hashlib.sha256()
    for key, fields in samples:
        for suffix, value in fields:
            if isinstance(value, Path):
                status = value.stat()
                content: Any = f"{value}\0{status.st_size}\0{status.st_mtime_ns}".encode()
            elif isinstance(value, np.ndarray):
                digest.update(f"{value.dtype.str}{value.shape}".encode())
                content = np.ascontiguousarray(value).data.cast("B") if value.size else b""
            else:
                content = value
            digest.update(f"{key}\0{suffix}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _blocks(samples: list[Sample], records: int) -> Iterator[tuple[bytes, int | None]]:
    """The bytes of a tar, piece by piece: (header, None), (content with its padding, size of the content)."""
    for name, content in _files(samples, records):
        yield tar.header(name, len(content)), None
        yield content + bytes(-len(content) % tar.BLOCK), len(content)
    yield bytes(2 * tar.BLOCK), None


def _files(samples: list[Sample], records: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members."""
    if records:
        read = [(key, [(s, _content(s, value)) for s, value in fields]) for key, fields in samples]
        yield from packed.blocks(read, records)
        return
    for key, fields in samples:
        for suffix, value in fields:
            yield f"{key}.{suffix}", _content(suffix, value)


def _content(suffix: str, value: Value) -> bytes:
    return value.read_bytes() if isinstance(value, Path) else encode(suffix, value)
