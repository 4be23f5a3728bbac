"""Samples of a split by number, in any order, straight from the mapped tars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import decode, packed, tar
from dist_train.data_shards.index import Field, Index, Shard
from dist_train.data_shards.mapped import MappedShards
from dist_train.data_shards.order import Order, default_streams
from dist_train.data_shards.pictures import decode_picture
from dist_train.data_shards.shard_table import samples_of
from dist_train.data_shards.storage import Bucket, Folder, Storage
from dist_train.errors import UserError, nearest


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
        self.sizes = samples_of(self.shards)
        self._stops = np.cumsum(self.sizes)
        self._mapped = MappedShards(self.storage, self.shards, len(self.fields))

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
        return {name: self.views(name, np.array([i]))[0] for name in self.fields}

    def value(self, i: int, name: str) -> Any:
        """One field of sample `i`, decoded; a kind that is not in the allow-list comes as bytes."""
        (view,) = self.views(name, np.array([i]))
        return self._decode(i, name, view)

    def sample(self, i: int, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """Sample `i`, decoded: all fields but those of unknown kind, which come as bytes when `fields` names them."""
        if fields is None:
            fields = [spec.name for spec in self.index.fields.values() if spec.kind != "bytes"]
        return {name: self.value(i, name) for name in fields}

    def views(self, name: str, ids: np.ndarray) -> list[memoryview]:
        """The bytes of one field of many samples, not copied."""
        numbers, places = self._places(ids)
        return self._views(numbers, places[:, self._field(name)])

    def column(self, name: str, ids: np.ndarray) -> Any:
        """One field of many samples: an array (len(ids), ...) where it is numbers of one shape, else a list."""
        return self.columns([name], ids)[name]

    def columns(self, names: Sequence[str], ids: np.ndarray) -> dict[str, Any]:
        """Several fields of the same samples."""
        numbers, places = self._places(ids)
        return {
            name: self._column(name, ids, numbers, places[:, self._field(name)]) for name in names
        }

    def _column(self, name: str, ids: np.ndarray, numbers: np.ndarray, places: np.ndarray) -> Any:
        """`places` (n, 2) is where the field stands in the shards `numbers` (n,)."""
        suffix = self.fields[name][1]
        spec, kind = self.index.fields[suffix], suffix.rpartition(".")[2]
        column = None
        if spec.raw or kind == "npy":
            column = self._stacked(spec, numbers, places)
        elif kind == "cls":
            column = self._labels(numbers, places)
        elif kind in decode.PICTURES and spec.shape and None not in spec.shape:
            column = self._pictures(spec.shape, numbers, places)
        if column is not None:
            return column
        views = zip(ids.tolist(), self._views(numbers, places), strict=True)
        return [self._decode(i, name, view) for i, view in views]

    def _field(self, name: str) -> int:
        """Which of the fields in a row of a table has this name."""
        if name not in self.fields:
            known = ", ".join(self.fields)
            raise UserError(
                f"{self.storage.name}: no field '{name}'{nearest(name, self.fields)} (there are {known})"
            )
        return self.fields[name][0]

    def _places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards (n,), (offset, size) of each of their fields (n, fields, 2))."""
        numbers, rows = self._rows(ids)
        return numbers, self._mapped.places(numbers, rows)

    def _views(self, numbers: np.ndarray, places: np.ndarray) -> list[memoryview]:
        pairs = zip(numbers.tolist(), places.tolist(), strict=True)
        return [self._mapped.view(number, offset, size) for number, (offset, size) in pairs]

    def _stacked(self, spec: Field, numbers: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """Arrays of one dtype and shape as one array; None where there is no such shape."""
        offsets, sizes = places.T
        if not len(sizes) or (sizes != sizes[0]).any():
            return None
        size, start = int(sizes[0]), 0
        if spec.raw:
            dtype, shape = np.dtype(spec.dtype), tuple(spec.shape or ())
            if spec.kind == "tokens":
                shape = (size // dtype.itemsize,)
        else:
            first = self._mapped.view(int(numbers[0]), int(offsets[0]), size)
            try:
                start = decode.npy_header_size(first)
                dtype, fortran, shape, count = decode.npy_header(bytes(first[:start]))
            except ValueError:
                return None  # said where it is decoded alone, with the sample's name
            if fortran or size != start + count * dtype.itemsize:
                return None
            headers = self._mapped.gather(numbers, offsets, start).reshape(len(numbers), start)
            if (headers != headers[0]).any():
                return None
        elements = self._mapped.gather(numbers, offsets + start, size - start)
        return elements.view(dtype).reshape(len(numbers), *shape)

    def _labels(self, numbers: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """Whole numbers written in digits; None where one is not."""
        offsets, sizes = places.T
        labels = np.empty(len(sizes), np.int64)
        for size in np.unique(sizes).tolist():
            own = sizes == size
            digits = self._mapped.gather(numbers[own], offsets[own], size)
            if not size or not digits.all():
                return None
            try:
                labels[own] = digits.view(f"S{size}").astype(np.int64)
            except (ValueError, OverflowError):
                return None
        return labels

    def _pictures(
        self, shape: list[int | None], numbers: np.ndarray, places: np.ndarray
    ) -> np.ndarray | None:
        """Pictures decoded into one array; None where one has not the shape that the index names, or is damaged."""
        pixels = np.empty((len(numbers), *(side or 0 for side in shape)), np.uint8)
        try:
            for view, out in zip(self._views(numbers, places), pixels, strict=True):
                if decode_picture(view, shape[2], out).shape != out.shape:
                    return None
        except (ValueError, OSError, SyntaxError, TypeError):
            return None  # said where it is decoded alone, with the sample's name
        return pixels

    def needs(self, ids: np.ndarray) -> list[tuple[Bucket, Shard]]:
        """The shards that reading `ids` fetches from elsewhere, in that order."""
        if not isinstance(self.storage, Bucket):
            return []
        numbers = dict.fromkeys(np.searchsorted(self._stops, ids, "right").tolist())
        return [(self.storage, self.shards[number]) for number in numbers]

    def key(self, i: int) -> str:
        """The key of sample `i`, read from its tar header."""
        (number,), (row,) = self._rows(np.array([i]))
        table, path = self._mapped.table(int(number)), self.storage.tar(self._shard(i))
        if packed.is_packed(path):
            return packed.key_of(path, table[row].reshape(-1).tolist())
        offset = int(table[row, 0, 0])
        near = table[max(0, row - 1) : row + 1].reshape(-1, 2).sum(1)
        ends = -(-near // tar.BLOCK) * tar.BLOCK
        start = int(ends.max(where=ends <= offset, initial=0))
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

    def _rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the shard of each of `ids`, its row in that shard's table)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample {ids.min()} or {ids.max()} of {len(self)}")
        numbers = np.searchsorted(self._stops, ids, "right")
        return numbers, ids - self._stops[numbers] + self.sizes[numbers]
