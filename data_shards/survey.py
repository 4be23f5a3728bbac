"""What only the samples tell of a data set: kinds and shapes of fields, classes, statistics, tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import decode
from dist_train.data_shards.index import Field, Index, Shard
from dist_train.data_shards.reader import Shards
from dist_train.errors import UserError

MOST_CLASSES = 1_000_000
SURVEYED = 20_000
"""At most this many samples of the training split, evenly spread, are read for their statistics."""
WIDEST = 4096
"""Float arrays with a longer last axis have no statistics."""


def undecodable(
    folder: Path, split: str, shard: Shard, index: Index, dtypes: dict[str, np.dtype | None]
) -> dict[int, str]:
    """{row of the table: what is wrong} of the samples of one shard that cannot be decoded, or have other `dtypes`."""
    shards = Shards(folder, split, dataclasses.replace(index, splits={split: [shard]}))
    limit = len(index.classes) or MOST_CLASSES
    found = {}
    for i in range(len(shards)):
        try:
            sample = shards.sample(i, tuple(shards.fields))
            label = sample.get("label", 0)
            if isinstance(label, int) and not 0 <= label < limit:
                raise UserError(f"{shards.where(i)}: label {label} is not in [0, {limit})")
            for name, value in sample.items():
                dtype = value.dtype if isinstance(value, np.ndarray) else None
                if dtypes.setdefault(name, dtype) != dtype:
                    raise UserError(
                        f"{shards.where(i)}, field '{name}': is {dtype}, that of others {dtypes[name]}"
                    )
        except UserError as error:
            found[i] = str(error)
    return found


def survey(folder: Path, index: Index) -> None:
    """Fill in what only the samples tell: kinds, shapes, classes, statistics, tokens."""
    splits = {split: Shards(folder, split, index) for split in index.splits}
    first = splits.get("train") or next(iter(splits.values()))
    for suffix, spec in index.fields.items():
        kind = suffix.rpartition(".")[2]
        if kind in decode.PICTURES:
            spec.kind, spec.dtype = "image", "uint8"
        elif kind == "npy":
            array = first.value(0, spec.name)
            image = spec.name == "image" and array.dtype == np.uint8 and array.ndim in (2, 3)
            tokens = spec.name == "tokens" and array.ndim == 1 and array.dtype.kind in "ui"
            spec.kind = "image" if image else "tokens" if tokens else "array"
            spec.dtype = str(array.dtype)
        else:
            spec.kind = {"cls": "label", "txt": "text", "json": "json"}.get(kind, "bytes")
        if spec.kind == "label":
            _survey_labels(index, splits, spec.name)
        elif spec.kind == "tokens":
            _survey_tokens(index, splits, spec)
        elif spec.kind in ("image", "array"):
            _survey_arrays(index, first, spec)


def _survey_labels(index: Index, splits: dict[str, Any], name: str) -> None:
    highest, limit = 0, len(index.classes) or MOST_CLASSES
    for shards in splits.values():
        for i in range(len(shards)):
            label = shards.value(i, name)
            if not 0 <= label < limit:
                raise UserError(f"{shards.where(i)}: label {label} is not in [0, {limit})")
            highest = max(highest, label)
    index.classes = index.classes or [str(number) for number in range(highest + 1)]


def _survey_tokens(index: Index, splits: dict[str, Any], spec: Field) -> None:
    longest = 0
    for split, shards in splits.items():
        lengths = [len(shards.value(i, spec.name)) for i in range(len(shards))]
        if min(lengths) < 2:
            raise UserError(f"{shards.where(int(np.argmin(lengths)))}: fewer than 2 tokens")
        index.tokens[split] = sum(lengths) - len(lengths)
        longest = max(longest, *lengths)
    spec.shape = [longest]
    if index.vocabulary is None and spec.dtype == "uint8":
        index.vocabulary = 256


def _survey_arrays(index: Index, shards: Any, spec: Field) -> None:
    """Shapes, and mean and deviation: of images per channel where white is 1, of floats along their last axis."""
    shapes: set[tuple[int, ...]] = set()
    ids = np.linspace(0, len(shards) - 1, min(len(shards), SURVEYED)).astype(np.int64).tolist()
    for i in ids:
        array = shards.value(i, spec.name)
        if str(array.dtype) != spec.dtype:
            raise UserError(
                f"{shards.where(i)}, field '{spec.name}': is {array.dtype}, that of the first sample {spec.dtype}"
            )
        shapes.add(array.shape)
    if len({len(shape) for shape in shapes}) > 1:
        return
    spec.shape = [
        sizes.pop() if len(sizes) == 1 else None for sizes in map(set, zip(*shapes, strict=True))
    ]
    values = (shards.value(i, spec.name) for i in ids)
    if spec.kind == "image":
        if len(spec.shape) == 3 and spec.shape[2] is None:
            spec.shape[2] = 3  # grey and colour pictures mixed: read all as colour
        channels = len(spec.shape) == 3
        columns = (image.reshape(-1, image.shape[2] if channels else 1) for image in values)
        index.statistics[spec.name] = _statistics(columns, unit=255)
    elif np.dtype(spec.dtype).kind == "f":
        width = spec.shape[-1] if spec.shape else 1
        if width is not None and 0 < width <= WIDEST:
            columns = (array.reshape(-1, width) for array in values)
            index.statistics[spec.name] = _statistics(columns, unit=1)


def _statistics(columns: Iterable[np.ndarray], unit: int) -> dict[str, list[float]]:
    """Mean and deviation of each of C columns, to 9 digits, over arrays (n, C) one after the other (Chan 1979)."""
    count, mean, squares = 0, np.float64(0), np.float64(0)
    for block in columns:
        rows = block.astype(np.float64)
        if not len(rows):
            continue
        own = rows.mean(0)
        step, total = own - mean, count + len(rows)
        squares = (
            squares + np.square(rows - own).sum(0) + np.square(step) * count * len(rows) / total
        )
        mean, count = mean + step * len(rows) / total, total
    deviation = np.sqrt(np.atleast_1d(squares) / max(count, 1))
    return {
        "mean": [float(f"{value / unit:.9g}") for value in np.atleast_1d(mean)],
        "std": [float(f"{value / unit:.9g}") for value in deviation],
    }
