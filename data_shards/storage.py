"""Where the files of a set of shards stand: on this machine, or behind an address with a cache before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_train.data_shards.index import Shard, sidecar


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

    def table(self, shard: Shard) -> Path:
        """Its table of offsets."""


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

    def table(self, shard: Shard) -> Path:
        return sidecar(self.path / shard.file)
