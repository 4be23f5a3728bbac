"""Samples of a split by number, in any order, straight from the mapped tars."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import decode, tar
from dist_train.data_shards.index import Index, sidecar
from dist_train.errors import UserError, nearest


class Shards:
    """One split of a folder of shards; sample i is the i-th in the order of files and members."""

    def __init__(self, folder: str | Path, split: str, index: Index | None = None) -> None:
        self.folder = Path(folder)
        self.split = split
        self.index = index or Index.load(self.folder)
        self.shards = self.index.split(split)
        self.fields = {
            spec.name: (k, suffix) for k, (suffix, spec) in enumerate(self.index.fields.items())
        }
        self._stops = list(itertools.accumulate(shard.samples for shard in self.shards))
        self._places = [(name, 2 * place) for name, (place, _) in self.fields.items()]
        self._open: list[tuple[memoryview, memoryview, int] | None] = [None] * len(self.shards)

    def __len__(self) -> int:
        return self._stops[-1]

    @property
    def sizes(self) -> list[int]:
        """How many samples each shard has."""
        return [shard.samples for shard in self.shards]

    @property
    def tokens(self) -> int | None:
        """How many targets the split has, where its samples are tokens."""
        return self.index.tokens.get(self.split)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self.split, self.index)

    def raw(self, i: int) -> dict[str, memoryview]:
        """The bytes of each field of sample `i`, not copied."""
        data, table, row = self._locate(i)
        return {
            name: data[table[row + place] : table[row + place] + table[row + place + 1]]
            for name, place in self._places
        }

    def value(self, i: int, name: str) -> Any:
        """One field of sample `i`, decoded; a kind that is not in the allow-list comes as bytes."""
        if name not in self.fields:
            known = ", ".join(self.fields)
            raise UserError(
                f"{self.folder}: no field '{name}'{nearest(name, self.fields)} (there are {known})"
            )
        place, suffix = self.fields[name]
        data, table, row = self._locate(i)
        start = table[row + 2 * place]
        return self._decode(i, name, suffix, data[start : start + table[row + 2 * place + 1]])

    def sample(self, i: int, fields: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Sample `i`, decoded: all fields but those of unknown kind, which come as bytes when `fields` names them."""
        if fields is not None:
            return {name: self.value(i, name) for name in fields}
        return {
            name: self._decode(i, name, self.fields[name][1], view)
            for name, view in self.raw(i).items()
            if self.index.fields[self.fields[name][1]].kind != "bytes"
        }

    def column(self, name: str, ids: np.ndarray) -> Any:
        """One field of many samples: an array (len(ids), ...) where `.npy` headers agree, else a list."""
        suffix = self.fields[name][1]
        if suffix.rpartition(".")[2] == "npy":
            views = [self.raw(i)[name] for i in ids.tolist()]
            size = len(views[0])
            if all(len(view) == size for view in views):
                block = np.frombuffer(bytearray().join(views), np.uint8).reshape(len(views), size)
                first = self._decode(int(ids[0]), name, suffix, views[0])
                start = size - first.nbytes
                if first.flags.c_contiguous and (block[:, :start] == block[0, :start]).all():
                    elements = np.ascontiguousarray(block[:, start:]).view(first.dtype)
                    return elements.reshape(len(views), *first.shape)
        return [self.value(i, name) for i in ids.tolist()]

    def key(self, i: int) -> str:
        """The key of sample `i`, read from its tar header."""
        _, table, row = self._locate(i)
        width = 2 * len(self._places)
        offset = table[row]
        near = range(max(0, row - width), row + width, 2)
        ends = [-(-(table[at] + table[at + 1]) // tar.BLOCK) * tar.BLOCK for at in near]
        return tar.key_at(self._path(i), max([0, *(end for end in ends if end <= offset)]), offset)

    def where(self, i: int) -> str:
        """Shard and key of sample `i`, for messages."""
        return f"{self._path(i)}: sample '{self.key(i)}'"

    def _path(self, i: int) -> Path:
        return self.folder / self.shards[bisect.bisect_right(self._stops, i)].file

    def _decode(self, i: int, name: str, suffix: str, view: memoryview) -> Any:
        kind = suffix.rpartition(".")[2]
        try:
            if kind in decode.PICTURES:
                shape = self.index.fields[suffix].shape
                return decode.decode_picture(view, shape[2] if shape else None)
            return decode.DECODERS.get(kind, bytes)(view)
        except UserError:
            raise
        except (ValueError, OSError, SyntaxError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.where(i)}, field '{name}': cannot be decoded: {error}"
            ) from error

    def _locate(self, i: int) -> tuple[memoryview, memoryview, int]:
        """(bytes of the shard, its flat table of offsets, place of sample `i` in that table)."""
        if not 0 <= i < self._stops[-1]:
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect.bisect_right(self._stops, i)
        data, table, width = self._open[number] or self._map(number)
        return data, table, (i - self._stops[number] + self.shards[number].samples) * width

    def _map(self, number: int) -> tuple[memoryview, memoryview, int]:
        shard = self.shards[number]
        path, offsets = self.folder / shard.file, sidecar(self.folder / shard.file)
        width = 2 * len(self.fields)
        try:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            table = np.load(offsets, mmap_mode="r", allow_pickle=False)
            digest = hashlib.sha256(offsets.read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be opened: {error}") from error
        if len(data) != shard.bytes:
            raise UserError(f"{path}: has {len(data)} bytes, {shard.bytes} when it was indexed")
        if digest != shard.offsets_sha256 or table.shape != (shard.samples, width // 2, 2):
            raise UserError(f"{offsets}: not the table that index.json names")
        opened = (data, memoryview(table.reshape(-1)), width)
        self._open[number] = opened
        return opened
