"""Where the files of a set of shards stand: on this machine, or behind an address with a cache before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_train.data_shards.cache import Cache
from dist_train.data_shards.index import Index, Shard, sidecar
from dist_train.data_shards.publish import publish
from dist_train.data_shards.remote import check_address, is_remote, read
from dist_train.errors import UserError

MOST = 1 << 30
"""Bytes of an index that is read from elsewhere."""


class Storage(Protocol):
    """Gives each file of a set of shards as a file of this machine.

    `most_open`: how many shards a reader may keep mapped. `name`: how errors call the set.
    """

    @property
    def name(self) -> str: ...

    @property
    def most_open(self) -> int: ...

    def tar(self, shard: Shard) -> Path:
        """The tar."""

    def table(self, shard: Shard, size: int) -> Path:
        """Its table of offsets, of `size` bytes."""


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    path: Path
    most_open: int = 8192

    @property
    def name(self) -> str:
        return str(self.path)

    def tar(self, shard: Shard) -> Path:
        return self.path / shard.file

    def table(self, shard: Shard, size: int) -> Path:
        return sidecar(self.path / shard.file)


@dataclass(frozen=True)
class Bucket:
    """A folder behind an address; `index` is the address or folder of its index and tables, if that is another."""

    address: str
    cache: Cache
    index: str = ""
    most_open: int = 512

    def __post_init__(self) -> None:
        for address in (self.address, self.index):
            if address and (is_remote(address) or address == self.address):
                check_address(address)

    @property
    def name(self) -> str:
        return self.address.rstrip("/")

    def tar(self, shard: Shard) -> Path:
        return self.cache.path(f"{self.name}/{shard.file}", shard.sha256, shard.bytes)

    def table(self, shard: Shard, size: int) -> Path:
        name = sidecar(Path(shard.file)).name
        if not is_remote(self._index):
            return Path(self._index) / name
        return self.cache.path(f"{self._index}/{name}", shard.offsets_sha256, size)

    def read_index(self) -> Index:
        """Its index. Whoever made the tars makes it, never a job that reads them."""
        try:
            if not is_remote(self._index):
                return Index.read(Path(self._index))
            content = read(f"{self._index}/index.json", MOST, self.cache.patience)
        except UserError as error:
            raise UserError(
                f"{error} (an index is made where the tars are: dist-train shards index FOLDER; its index.json and "
                "*.index.npy stand beside the tars, or where data.index says)"
            ) from error
        folder = self.cache.folder / "indexes" / hashlib.sha256(content).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        publish(folder / "index.json", content)

        def find(name: str, sha256: str, size: int) -> Path:
            return self.cache.path(f"{self._index}/{name}", sha256, size)

        try:
            return Index.read(folder, find)
        except UserError as error:
            raise UserError(f"{self._index}: {error}") from error

    @property
    def _index(self) -> str:
        return (self.index or self.address).rstrip("/")
