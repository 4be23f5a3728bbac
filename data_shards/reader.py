"""Samples of a split by number, in any order, straight from the mapped tars."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.data_shards import decode, packed, tar
from dist_train.data_shards.index import Field, Index, Shard
from dist_train.data_shards.order import Order, default_streams
from dist_train.data_shards.pictures import decode_picture
from dist_train.data_shards.storage import Bucket, Folder, Storage
from dist_train.errors import UserError, nearest

Mapped = tuple[memoryview, memoryview]
"""(bytes of a shard, its table of offsets, flat)"""
NPY_HEADER = 128
"""Bytes before the numbers of a table."""


class Shards:
    """One split of a folder of shards; sample i is the i-th in the order of files and members."""

    def __init__(
        self,
        folder: str | Path,
        split: str,
        index: Index | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.split = split
        self.storage: Storage = storage or Folder(self.folder)
        self.index = index or Index.load(self.folder)
        self.shards = self.index.split(split)
        self.fields = {
            spec.name: (k, suffix) for k, (suffix, spec) in enumerate(self.index.fields.items())
        }
        self.sizes = np.array([shard.samples for shard in self.shards], np.int64)
        self._stops = np.cumsum(self.sizes)
        self._width = 2 * len(self.fields)
        self._open: dict[int, Mapped] = {}
        self._checked = bytearray(len(self.shards))

    @classmethod
    def remote(cls, bucket: Bucket, split: str) -> Shards:
        """One split of the shards behind an address."""
        return cls(bucket.cache.folder, split, bucket.read_index(), bucket)

    def __len__(self) -> int:
        return int(self._stops[-1])

    @property
    def tokens(self) -> int | None:
        """How many targets the split has, where its samples are tokens."""
        return self.index.tokens.get(self.split)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder, self.split, self.index, self.storage)

    def order(
        self,
        seed: int,
        batch: int,
        *,
        shuffle: str = "auto",
        window: int = 16,
        streams: int | str = "auto",
    ) -> Order:
        """The order in which these samples are trained on; `auto` suits where they are (see `Order`)."""
        remote = isinstance(self.storage, Bucket)
        if shuffle == "auto":
            shuffle = "window" if remote else "global"
        if isinstance(streams, str):
            streams = default_streams(batch) if remote else 1
        return Order(
            len(self),
            seed,
            shuffle=shuffle,
            shards=self.sizes,
            window=window,
            batch=batch,
            streams=streams,
        )

    def raw(self, i: int) -> dict[str, memoryview]:
        """The bytes of each field of sample `i`, not copied."""
        data, table, row = self._locate(i)
        return {
            name: data[table[row + 2 * k] : table[row + 2 * k] + table[row + 2 * k + 1]]
            for name, (k, _) in self.fields.items()
        }

    def value(self, i: int, name: str) -> Any:
        """One field of sample `i`, decoded; a kind that is not in the allow-list comes as bytes."""
        (view,) = self.views(name, np.array([i]))
        return self._decode(i, name, view)

    def sample(self, i: int, fields: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Sample `i`, decoded: all fields but those of unknown kind, which come as bytes when `fields` names them."""
        if fields is not None:
            return {name: self.value(i, name) for name in fields}
        return {
            name: self._decode(i, name, view)
            for name, view in self.raw(i).items()
            if self.index.fields[self.fields[name][1]].kind != "bytes"
        }

    def views(self, name: str, ids: np.ndarray) -> list[memoryview]:
        """The bytes of one field of many samples, not copied."""
        place, _ = self._field(name)
        numbers, rows = self._rows(ids)
        views = []
        for number, at in zip(numbers.tolist(), (rows * self._width + place).tolist(), strict=True):
            data, table = self._open.get(number) or self._map(number)
            start = table[at]
            views.append(data[start : start + table[at + 1]])
        return views

    def column(self, name: str, ids: np.ndarray) -> Any:
        """One field of many samples: an array (len(ids), ...) where `.npy` headers agree, else a list."""
        place, suffix = self._field(name)
        spec = self.index.fields[suffix]
        if spec.raw and spec.kind != "tokens":
            return self._gathered(place, spec, ids)
        views = self.views(name, ids)
        if suffix.rpartition(".")[2] == "npy":
            stacked = self._stacked(int(ids[0]), name, views)
            if stacked is not None:
                return stacked
        if suffix == "cls":
            try:
                return [int(bytes(view)) for view in views]
            except ValueError:
                pass  # said below, with the sample's name
        return [self._decode(i, name, view) for i, view in zip(ids.tolist(), views, strict=True)]

    def _field(self, name: str) -> tuple[int, str]:
        """(where the field stands in a row of the table, its suffix)."""
        if name not in self.fields:
            known = ", ".join(self.fields)
            raise UserError(
                f"{self.storage.name}: no field '{name}'{nearest(name, self.fields)} (there are {known})"
            )
        number, suffix = self.fields[name]
        return 2 * number, suffix

    def _gathered(self, place: int, spec: Field, ids: np.ndarray) -> np.ndarray:
        """Elements of one shape as one array: each shard is seen as rows that begin at every byte, some are taken."""
        dtype, shape = np.dtype(spec.dtype), tuple(size or 0 for size in spec.shape or ())
        size = dtype.itemsize * math.prod(shape)
        gathered = np.empty((len(ids), size), np.uint8)
        numbers, rows = self._rows(ids)
        for number in np.unique(numbers).tolist() if size else ():
            data, table = self._open.get(number) or self._map(number)
            own = numbers == number
            offsets = np.frombuffer(table, np.int64).reshape(-1, self._width)
            starts = offsets[rows[own], place]
            content = np.frombuffer(data, np.uint8)
            every = np.lib.stride_tricks.sliding_window_view(content, size)
            gathered[own] = every[starts]
        return gathered.view(dtype).reshape(len(ids), *shape)

    def _stacked(self, i: int, name: str, views: list[memoryview]) -> np.ndarray | None:
        """`.npy` files with one header as one array, each copied once; None where headers differ."""
        first = np.asarray(self._decode(i, name, views[0]))
        size = first.nbytes
        start = len(views[0]) - size
        header = bytes(views[0][:start])
        if not first.flags.c_contiguous or size == 0:
            return None
        stacked = np.empty((len(views), *first.shape), first.dtype)
        target, at = stacked.reshape(-1).view(np.uint8).data, 0
        for view in views:
            if len(view) != start + size or view[:start].tobytes() != header:
                return None
            target[at : at + size] = view[start:]
            at += size
        return stacked

    def needs(self, ids: np.ndarray) -> list[tuple[Bucket, Shard]]:
        """The shards that reading `ids` fetches from elsewhere, in that order."""
        if not isinstance(self.storage, Bucket):
            return []
        numbers = dict.fromkeys(np.searchsorted(self._stops, ids, "right").tolist())
        return [(self.storage, self.shards[number]) for number in numbers]

    def key(self, i: int) -> str:
        """The key of sample `i`, read from its tar header."""
        _, table, row = self._locate(i)
        path = self.storage.tar(self._shard(i))
        if packed.is_packed(path):
            return packed.key_of(path, list(table[row : row + self._width]))
        offset = table[row]
        near = range(max(0, row - self._width), row + self._width, 2)
        ends = [-(-(table[at] + table[at + 1]) // tar.BLOCK) * tar.BLOCK for at in near]
        start = max([0, *(end for end in ends if end <= offset)])
        return tar.key_at(path, start, offset)

    def where(self, i: int) -> str:
        """Shard and key of sample `i`, for messages."""
        return f"{self.storage.name}/{self._shard(i).file}: sample '{self.key(i)}'"

    def _shard(self, i: int) -> Shard:
        return self.shards[int(np.searchsorted(self._stops, i, "right"))]

    def _decode(self, i: int, name: str, view: memoryview) -> Any:
        suffix = self.fields[name][1]
        kind = suffix.rpartition(".")[2]
        try:
            if self.index.fields[suffix].raw:
                spec = self.index.fields[suffix]
                array = decode.decode_elements(view, spec.dtype or "", spec.shape or [])
                return int(array) if kind == "cls" else array
            if kind in decode.PICTURES:
                shape = self.index.fields[suffix].shape
                return decode_picture(view, shape[2] if shape else None)
            return decode.DECODERS.get(kind, bytes)(view)
        except UserError:
            raise
        except (ValueError, OSError, SyntaxError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.where(i)}, field '{name}': cannot be decoded: {error}"
            ) from error

    def _locate(self, i: int) -> tuple[memoryview, memoryview, int]:
        """(bytes of its shard, the shard's flat table, where sample `i` begins in that table)."""
        (number,), (row,) = self._rows(np.array([i]))
        data, table = self._open.get(int(number)) or self._map(int(number))
        return data, table, int(row) * self._width

    def _rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the shard of each of `ids`, its row in that shard's table)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample {ids.min()} or {ids.max()} of {len(self)}")
        numbers = np.searchsorted(self._stops, ids, "right")
        return numbers, ids - self._stops[numbers] + self.sizes[numbers]

    def _map(self, number: int) -> Mapped:
        """Map a shard and its table; both stay mapped until `most_open` others have been."""
        shard = self.shards[number]
        path = self.storage.tar(shard)
        offsets = self.storage.table(shard, NPY_HEADER + 8 * self._width * shard.samples)
        data, file = _mapped(path, shard.bytes), _mapped(offsets)
        try:
            table = decode.decode_npy(file)
        except ValueError:
            table = np.empty(0)
        good = self._checked[number] or hashlib.sha256(file).hexdigest() == shard.offsets_sha256
        if not good or table.shape != (shard.samples, self._width // 2, 2):
            raise UserError(f"{offsets}: not the table that index.json names")
        self._checked[number] = True
        if len(self._open) >= self.storage.most_open:
            del self._open[next(iter(self._open))]
        self._open[number] = data, table.reshape(-1).data
        return self._open[number]


def _mapped(path: Path, size: int | None = None) -> memoryview:
    """The bytes of a file, mapped read-only. torch does not keep the file open, as Python's mmap would."""
    try:
        found = path.stat().st_size
        if size not in (None, found):
            raise UserError(f"{path}: has {found} bytes, {size} when it was indexed")
        array = torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8).numpy()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be opened: {error}") from error
    array.flags.writeable = False
    return array.data
