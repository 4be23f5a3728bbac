"""Shards that are open: mapped into memory, where one call of numpy gathers what stands in any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.data_shards import decode
from dist_train.data_shards.index import Shard
from dist_train.data_shards.storage import Storage
from dist_train.errors import UserError

NPY_HEADER = 128
"""Bytes before the numbers of a table."""


class MappedShards:
    """The bytes of shards and their tables of offsets, mapped when they are first asked for.

    At most `storage.most_open` stay mapped, or as many as one call needs.
    """

    def __init__(self, storage: Storage, shards: Sequence[Shard], fields: int) -> None:
        self.storage, self.shards, self.fields = storage, shards, fields
        self._row = 16 * fields  # bytes of the (offset, size) of all fields
        self._mapped: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._checked = bytearray(len(shards))
        self._contents = np.zeros(len(shards), np.int64)  # where each begins in memory, 0: closed
        self._tables = np.zeros(len(shards), np.int64)

    def places(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, fields, 2): (offset, size) of each field of samples, whose shards and rows in their tables are given."""
        self._open(numbers)
        places = _gathered(self._tables[numbers] + rows * self._row, self._row)
        return places.view(np.int64).reshape(-1, self.fields, 2)

    def gather(self, numbers: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes at each of these places, as many as `places` said or fewer: a flat array, copied once."""
        return _gathered(self._contents[numbers] + offsets, size)

    def view(self, number: int, offset: int, size: int) -> memoryview:
        """The bytes at one place, not copied."""
        return self._mapped[number][0].data[offset : offset + size]

    def table(self, number: int) -> np.ndarray:
        """The table of one shard, int64 (samples, fields, 2)."""
        self._open(np.array([number]))
        return self._mapped[number][1]

    def _open(self, numbers: np.ndarray) -> None:
        """Map what is not; the oldest that are not needed now give way."""
        closed = np.unique(numbers[self._tables[numbers] == 0]).tolist()
        if closed:
            needed = set(numbers.tolist())
            spare = [number for number in self._mapped if number not in needed]
            surplus = max(0, len(self._mapped) + len(closed) - self.storage.most_open)
            for number in spare[:surplus]:
                del self._mapped[number]
                self._contents[number] = self._tables[number] = 0
        for number in closed:
            self._map(number)

    def _map(self, number: int) -> None:
        shard = self.shards[number]
        shape = (shard.samples, self.fields, 2)
        path = self.storage.tar(shard)
        offsets = self.storage.table(shard, NPY_HEADER + shard.samples * self._row)
        content, file = _mapped(path, shard.bytes), _mapped(offsets)
        try:
            table = decode.decode_npy(file.data)
        except ValueError:
            table = np.empty(0)
        fits = table.shape == shape and table.dtype == np.int64 and table.flags.c_contiguous
        if not self._checked[number]:
            fits = fits and hashlib.sha256(file.data).hexdigest() == shard.offsets_sha256
        if not fits:
            raise UserError(f"{offsets}: not the table that index.json names")
        if (table < 0).any() or (table[..., 0] > shard.bytes - table[..., 1]).any():
            raise UserError(f"{offsets}: leads out of {shard.file}")
        self._checked[number] = True
        self._mapped[number] = content, table
        self._contents[number] = content.ctypes.data
        self._tables[number] = table.ctypes.data


class _Memory:
    """Memory from `start` on, seen by numpy as pieces of `size` bytes that begin at every byte; `owner` stays alive."""

    def __init__(self, start: int, pieces: int, size: int, owner: Any = None) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (start, True),
            "shape": (pieces,),
            "strides": (1,),
            "typestr": f"|V{size}",
            "version": 3,
        }


def _gathered(addresses: np.ndarray, size: int) -> np.ndarray:
    """The `size` bytes at each of these addresses, which the caller knows to be mapped: a flat uint8 array."""
    if not len(addresses) or not size:
        return np.empty(0, np.uint8)
    first = int(addresses.min())
    pieces = np.asarray(_Memory(first, int(addresses.max()) - first + 1, size))
    return pieces[addresses - first].view(np.uint8)


def _mapped(path: Path, size: int | None = None) -> np.ndarray:
    """The bytes of a file, mapped read-only. A storage of torch does not keep the file open, as Python's mmap would."""
    try:
        found = path.stat().st_size
        if size not in (None, found):
            raise UserError(f"{path}: has {found} bytes, {size} when it was indexed")
        storage = torch.UntypedStorage.from_file(str(path), False, found)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be opened: {error}") from error
    return np.asarray(_Memory(storage.data_ptr(), found, 1, owner=storage)).view(np.uint8)
