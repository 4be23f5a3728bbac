"""Samples in, a folder of tar shards with their index out: the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_train.data_shards.decode import encode
from dist_train.data_shards.index import Index, index_shards
from dist_train.errors import UserError

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
Row = tuple[str, str, Mapping[str, Any]]
"""(split, key, {suffix: bytes | array | int | str})"""


def split_of(key: str, fractions: Mapping[str, float] = FRACTIONS) -> str:
    """The split of a sample as a function of its key alone: it stays there whatever else comes or goes."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"dist-train split").digest()
    place = int.from_bytes(digest, "little") / 2**64 * sum(fractions.values())
    for split, fraction in fractions.items():  # noqa: B007
        place -= fraction
        if place < 0:
            break
    return split


def write_shards(
    out: str | Path,
    name: str,
    samples: Iterable[Row],
    *,
    shard_size: int = 1000,
    classes: list[str] | None = None,
    vocabulary: int | None = None,
    source: str = "",
    licence: str = "",
) -> Index:
    """Write `samples` as tars `name-split-000000.tar`, ... of `shard_size` samples, and their index.

    The new folder `out` appears whole or not at all. UserError: `out` is not empty, a key or a split that cannot be.
    """
    out = Path(out)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"name '{name}': use letters, digits, '_', '.' and '-'")
    if shard_size < 1:
        raise UserError(f"shard_size {shard_size}: at least 1 sample")
    with _published(out) as folder:
        writers: dict[str, _Writer] = {}
        for split, key, fields in samples:
            if split not in FRACTIONS:
                raise UserError(f"split '{split}' of sample '{key}': use {', '.join(FRACTIONS)}")
            if split not in writers:
                writers[split] = _Writer(folder, f"{name}-{split}", shard_size)
            writers[split].add(key, fields)
        for writer in writers.values():
            writer.close()
        if not writers:
            raise UserError(f"'{name}': no samples to write")
        return index_shards(
            folder,
            name=name,
            classes=classes,
            vocabulary=vocabulary,
            source=source,
            licence=licence,
        )


class _Writer:
    """The shards of one split, one after the other."""

    def __init__(self, folder: Path, stem: str, shard_size: int) -> None:
        self.folder, self.stem, self.shard_size = folder, stem, shard_size
        self.samples = 0
        self.archive: tarfile.TarFile | None = None

    def add(self, key: str, fields: Mapping[str, Any]) -> None:
        parts = key.split("/")
        if not all(parts) or ".." in parts or "." in parts[-1] or not key.isprintable():
            raise UserError(
                f"key '{key}': no '.' in its last part, no '..', no empty part, printable"
            )
        if self.samples % self.shard_size == 0:
            self.close()
            path = self.folder / f"{self.stem}-{self.samples // self.shard_size:06d}.tar"
            self.archive = tarfile.open(path, "x", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        assert self.archive is not None
        for suffix in sorted(fields):
            content = encode(suffix, fields[suffix])
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(content)
            self.archive.addfile(member, io.BytesIO(content))
        self.samples += 1

    def close(self) -> None:
        if self.archive is not None:
            self.archive.close()
            with open(str(self.archive.name), "rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block ends well, and is gone when it does not.

    Of several processes that write the same `out` at once one wins; the content is the same.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}-{secrets.token_hex(4)}.tmp"
    folder.mkdir()
    try:
        yield folder
        try:
            folder.rename(out)
        except OSError:
            if not (out / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
