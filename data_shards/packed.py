"""Many small samples in one member of a tar: a block of rows for each field, so that a sample costs no header.

A block is one sample to webdataset, of plain `.npy` arrays and bytes:

    block-000000.keys.txt               the keys of its samples, a line each
    block-000000.image.npy              the arrays of one field, stacked: (samples, ...); `cls` as `cls.npy`
    block-000000.tokens.npy             tokens, one sample's after the other's
    block-000000.tokens.offsets.npy     where each begins, and the end
    block-000000.txt.bin                anything else, one after the other, with txt.offsets.npy

To our reader a sample is the part of these members that is its own, as the table of offsets says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import decode, tar
from dist_train.errors import UserError

KEYS = "keys.txt"
OFFSETS = ".offsets.npy"
BYTES = ".bin"
TOKENS = "tokens.npy"
Elements = dict[str, tuple[str, list[int | None]]]
"""{suffix: (dtype, shape)} of the fields whose bytes are the elements of an array, without a header"""


def blocks(
    samples: Sequence[tuple[str, list[tuple[str, bytes]]]], records: int
) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members that hold `samples`, `records` in a block.

    UserError: the arrays of a field differ in dtype or shape.
    """
    for number, start in enumerate(range(0, len(samples), records)):
        part = samples[start : start + records]
        block = f"block-{number:06d}"
        yield f"{block}.{KEYS}", "\n".join(key for key, _ in part).encode()
        for place, (suffix, _) in enumerate(part[0][1]):
            contents = [fields[place][1] for _, fields in part]
            if suffix == "cls":
                labels = np.array([int(content) for content in contents], np.int64)
                yield f"{block}.cls.npy", decode.encode("npy", labels)
            elif suffix.rpartition(".")[2] == "npy":
                arrays = [decode.decode_npy(memoryview(content)) for content in contents]
                keys = [key for key, _ in part]
                yield from _arrays(block, suffix, keys, arrays)
            else:
                yield f"{block}.{suffix}{BYTES}", b"".join(contents)
                yield f"{block}.{suffix}{OFFSETS}", _offsets([len(one) for one in contents])


def _arrays(
    block: str, suffix: str, keys: list[str], arrays: list[np.ndarray]
) -> Iterator[tuple[str, bytes]]:
    free = suffix == TOKENS
    for key, array in zip(keys, arrays, strict=True):
        if array.dtype != arrays[0].dtype or (not free and array.shape != arrays[0].shape):
            raise UserError(
                f"sample '{key}': '{suffix}' is {array.shape} of {array.dtype}, others are {arrays[0].shape} of "
                f"{arrays[0].dtype}; samples packed in blocks need one shape (records 0 packs them one by one)"
            )
    if free:
        yield f"{block}.{suffix}", decode.encode("npy", np.concatenate(arrays))
        yield f"{block}.tokens{OFFSETS}", _offsets([len(array) for array in arrays])
    else:
        yield f"{block}.{suffix}", decode.encode("npy", np.stack(arrays))


def _offsets(lengths: list[int]) -> bytes:
    return decode.encode("npy", np.cumsum([0, *lengths], dtype=np.int64))


def expand(
    path: Path, members: list[str], table: np.ndarray
) -> tuple[list[str], np.ndarray, Elements]:
    """From the (suffixes, table) of a tar's blocks to those of its samples, and what its arrays are made of."""
    suffixes = sorted(
        "cls" if name == "cls.npy" else name.removesuffix(BYTES)
        for name in members
        if name != KEYS and not name.endswith(OFFSETS)
    )
    rows: list[np.ndarray] = []
    elements: Elements = {}
    with path.open("rb") as file:

        def content(places: dict[str, list[int]], name: str) -> memoryview:
            file.seek(places[name][0])
            return memoryview(file.read(places[name][1]))

        for block in table.tolist():
            places = dict(zip(members, block, strict=True))
            try:
                count = len(bytes(content(places, KEYS)).splitlines())
                found = np.empty((count, len(suffixes), 2), np.int64)
                for k, suffix in enumerate(suffixes):
                    found[:, k], kind = _rows(suffix, places, content, count)
                    if kind is not None and elements.setdefault(suffix, kind) != kind:
                        raise ValueError(f"'{suffix}' is {kind}, in others {elements[suffix]}")
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"{path}: the block at byte {block[0][0]} is damaged: {error}"
                ) from error
            rows.append(found)
    return suffixes, np.concatenate(rows), elements


def _rows(
    suffix: str, places: dict[str, list[int]], content: Any, count: int
) -> tuple[np.ndarray, tuple[str, list[int | None]] | None]:
    """((offset, size) of one field of each sample of a block; dtype and shape of its arrays)."""
    kind = suffix.rpartition(".")[2]
    if kind == "npy" or suffix == "cls":
        name = "cls.npy" if suffix == "cls" else suffix
        start, size = places[name]
        array = decode.decode_npy(content(places, name))
        start += size - array.nbytes
        if suffix == TOKENS:
            bounds = decode.decode_npy(content(places, f"tokens{OFFSETS}")) * array.itemsize
            shape: list[int | None] = [None]
        else:
            bounds = np.arange(len(array) + 1) * (array.nbytes // max(len(array), 1))
            shape = list(array.shape[1:])
        size, made_of = array.nbytes, (array.dtype.str, shape)
    else:
        start, size = places[suffix + BYTES]
        bounds, made_of = decode.decode_npy(content(places, f"{suffix}{OFFSETS}")), None
    if len(bounds) != count + 1 or bounds[-1] != size or bounds[0] or (np.diff(bounds) < 0).any():
        raise ValueError(f"'{suffix}' has not the parts of {count} samples")
    return np.stack([start + bounds[:-1], np.diff(bounds)], axis=1), made_of


def is_packed(path: Path) -> bool:
    """Whether the first sample of a tar is a block."""
    first = None
    try:
        for key, suffix, _, _ in tar.members(path):
            first = first or key
            if key != first or suffix == KEYS:
                return key == first
    except UserError:  # what is wrong is told where the tar is read
        pass
    return False


def key_of(path: Path, row: list[int]) -> str:
    """The key of the sample with this row of (offset, size) in the table of a packed shard."""
    members, table = tar.scan(path)
    assert members is not None
    _, rows, _ = expand(path, members, table)
    found = np.flatnonzero((rows.reshape(len(rows), -1) == row).all(1))
    if not len(found):
        raise UserError(f"{path}: has no such sample: the shard is not the one indexed")
    return keys(path)[int(found[0])]


def keys(path: Path) -> list[str]:
    """The keys of a packed shard's samples, in order."""
    found: list[str] = []
    with path.open("rb") as file:
        for _, suffix, offset, size in tar.members(path):
            if suffix == KEYS:
                file.seek(offset)
                found += file.read(size).decode().splitlines()
    return found
