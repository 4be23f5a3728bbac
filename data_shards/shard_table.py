"""The shards of a split as columns: what thousands of them cost in memory, and in a file beside `index.json`."""

from __future__ import annotations

import hashlib
import io
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import UserError

LARGE = 10_000
"""Of a split with more shards than this `index.json` names a file of them."""


@dataclass
class Shard:
    """One tar, and the digest of its table of offsets (the sidecar)."""

    file: str
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str


class ShardTable(Sequence[Shard]):
    """Shards as the rows of a file, which is mapped; `size` and `sha256` are those of the file."""

    def __init__(self, rows: np.ndarray, size: int, sha256: str) -> None:
        self.rows, self.size, self.sha256 = rows, size, sha256

    @classmethod
    def load(cls, path: Path, sha256: str) -> ShardTable:
        """Map what `to_npy` wrote. UserError: it is not the file of this digest."""
        try:
            with path.open("rb") as file:
                good = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            rows = np.load(path, mmap_mode="r", allow_pickle=False) if good else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a table of shards that can be read: {error}") from error
        if rows is None or rows.ndim != 1 or rows.dtype.names != dtype(1).names:
            raise UserError(f"{path}: not the table of shards that index.json names")
        if not len(rows) or (np.strings.find(rows["file"], b"/") >= 0).any():
            raise UserError(f"{path}: holds no names of files")
        return cls(rows, path.stat().st_size, sha256)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return _shard(self.rows[operator.index(number)])

    def __iter__(self) -> Iterator[Shard]:
        return map(_shard, self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


def dtype(longest: int) -> np.dtype:
    """That of a row, where the longest name of a file has so many bytes."""
    return np.dtype(
        [
            ("file", f"S{longest}"),
            ("samples", "<i8"),
            ("bytes", "<i8"),
            ("sha256", "V32"),
            ("offsets_sha256", "V32"),
        ]
    )


def samples_of(shards: Sequence[Shard]) -> np.ndarray:
    """How many samples each has, int64."""
    if isinstance(shards, ShardTable):
        return np.array(shards.rows["samples"], np.int64)
    return np.array([shard.samples for shard in shards], np.int64)


def to_npy(shards: Sequence[Shard]) -> bytes:
    """The file that `ShardTable.load` maps."""
    names = [shard.file.encode() for shard in shards]
    rows = np.empty(len(shards), dtype(max(map(len, names))))
    rows["file"], rows["samples"] = names, samples_of(shards)
    rows["bytes"] = [shard.bytes for shard in shards]
    for name in ("sha256", "offsets_sha256"):
        digests = b"".join(bytes.fromhex(getattr(shard, name)) for shard in shards)
        rows[name] = np.frombuffer(digests, "V32")
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, allow_pickle=False)
    return file.getvalue()


def _shard(row: Any) -> Shard:
    file, samples, size, *digests = row.item()
    return Shard(file.decode(), samples, size, *(digest.hex() for digest in digests))
