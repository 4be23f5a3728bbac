"""The index beside a folder of tar shards: what it holds, where, and how to tell that it is still that."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.data_shards import decode, tar
from dist_train.errors import UserError, nearest

VERSION = 1
SURVEYED = 20_000
"""At most this many samples of the training split, evenly spread, are read for their statistics."""
WIDEST = 4096
"""Float arrays with a longer last axis have no statistics."""
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass
class Field:
    """One file of each sample. `shape` has None where samples differ; `kind` is what a batch makes of it."""

    name: str
    kind: str  # image | array | tokens | label | text | json | bytes
    dtype: str | None = None
    shape: list[int | None] | None = None


@dataclass
class Shard:
    """One tar, and the digest of its table of offsets (the sidecar)."""

    file: str
    samples: int
    bytes: int
    sha256: str
    offsets_sha256: str


@dataclass
class Index:
    """All that `index.json` says. `tokens` counts targets: a piece of n tokens has n - 1."""

    name: str
    fields: dict[str, Field]
    splits: dict[str, list[Shard]]
    classes: list[str] = field(default_factory=list)
    statistics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    vocabulary: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    version: int = VERSION

    @classmethod
    def load(cls, folder: str | Path) -> Index:
        """Read the index of `folder`, making it first where there is none; every tar must have the size it names."""
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            return index_shards(folder)
        index = cls.read(folder)
        problems = index.misfits(folder)
        if problems:
            raise UserError(f"{problems[0]} (if that is meant: dist-train shards index {folder})")
        return index

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read `index.json` alone, without a look at the tars."""
        path = folder / "index.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise UserError(f"{path}: version {data['version']}; this program reads {VERSION}")
            data["fields"] = {suffix: Field(**spec) for suffix, spec in data["fields"].items()}
            data["splits"] = {
                split: [Shard(**shard) for shard in shards]
                for split, shards in data["splits"].items()
            }
            index = cls(**data)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeError) as error:
            raise UserError(f"{path}: not an index of shards ({error!r})") from error
        for shard in index.shards():
            if Path(shard.file).name != shard.file:
                raise UserError(f"{path}: '{shard.file}' leads out of the folder")
        return index

    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for shards in self.splits.values() for shard in shards]

    def split(self, split: str) -> list[Shard]:
        """The shards of one split."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise UserError(
                f"data '{self.name}' has no split '{split}'{nearest(split, self.splits)} (it has {known})"
            )
        return self.splits[split]

    def samples(self, split: str) -> int:
        """How many samples a split has."""
        return sum(shard.samples for shard in self.split(split))

    def misfits(self, folder: Path) -> list[str]:
        """What differs between the index and the files of `folder`, as far as names and sizes tell."""
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
        found = []
        for shard in self.shards():
            size = sizes.pop(shard.file, None)
            if size is None:
                found.append(f"{folder / shard.file}: named in index.json, but missing")
            elif size != shard.bytes:
                found.append(
                    f"{folder / shard.file}: has {size} bytes, {shard.bytes} when it was indexed"
                )
        return found + [f"{folder / name}: not in index.json" for name in sorted(sizes)]

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole index, and so of every byte of the data."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The values that `auto` can take in a recipe, those that the data know."""
        known: dict[str, Any] = {}
        for spec in self.fields.values():
            if spec.kind == "image" and spec.shape is not None:
                known["channels"] = known["in_channels"] = spec.shape[2] if spec.shape[2:] else 1
                if spec.shape[0] is not None and spec.shape[0] == spec.shape[1]:
                    known["image_size"] = spec.shape[0]
                    known["in_features"] = spec.shape[0] ** 2 * known["channels"]
            if spec.name == "features" and spec.shape is not None and None not in spec.shape:
                known["in_features"] = math.prod(n for n in spec.shape if n is not None)
            if spec.kind == "tokens" and spec.shape is not None and spec.shape[0] is not None:
                known["max_length"] = spec.shape[0] - 1
        if self.classes:
            known["num_classes"] = known["num_outputs"] = len(self.classes)
        if self.vocabulary is not None:
            known["vocab_size"] = self.vocabulary
        return known


def sidecar(shard: Path) -> Path:
    """Where the table of offsets of a shard stands."""
    return shard.with_suffix(".index.npy")


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def split_of_file(name: str) -> str:
    """The split that a tar's name tells (`pets-val-000001.tar`, `test-00.tar`); without one it is for training."""
    words = re.split(r"[-_.]", name.lower().removesuffix(".tar"))
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "train")


def in_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key of file names: numbers by value, words by letter."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", path.name)
        if part
    ]


def index_shards(
    folder: str | Path,
    *,
    name: str | None = None,
    classes: list[str] | None = None,
    vocabulary: int | None = None,
    source: str = "",
    licence: str = "",
) -> Index:
    """Read every tar of `folder` and write its index there.

    UserError names shard, key and byte of what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards")
    paths = sorted(folder.glob("*.tar"), key=in_order)
    if not paths:
        raise UserError(
            f"{folder}: holds no .tar shards (dist-train shards pack SOURCE OUT makes them)"
        )
    suffixes: list[str] | None = None
    splits: dict[str, list[Shard]] = {}
    for path in paths:
        suffixes, table = tar.scan(path, suffixes)
        digest, split = sha256(path), split_of_file(path.name)
        copy = next((shard for shard in splits.get(split, []) if shard.sha256 == digest), None)
        if copy is not None:
            raise UserError(f"{path}: the same bytes as {copy.file}: one of them is a copy")
        offsets = decode.encode("npy", table)
        publish(sidecar(path), offsets)
        shard = Shard(
            path.name,
            len(table),
            path.stat().st_size,
            digest,
            hashlib.sha256(offsets).hexdigest(),
        )
        splits.setdefault(split, []).append(shard)
    assert suffixes is not None
    names = [decode.field_name(suffix) for suffix in suffixes]
    for field_name in names:
        if names.count(field_name) > 1:
            twice = [suffix for suffix in suffixes if decode.field_name(suffix) == field_name]
            raise UserError(f"{paths[0]}: {' and '.join(twice)} are both the field '{field_name}'")
    index = Index(
        name=name or folder.resolve().name,
        fields={suffix: Field(decode.field_name(suffix), "bytes") for suffix in suffixes},
        splits={
            split: splits[split] for split in dict.fromkeys(SPLITS.values()) if split in splits
        },
        classes=classes or [],
        vocabulary=vocabulary,
        source=source,
        licence=licence,
    )
    _survey(folder, index)
    publish(folder / "index.json", index.to_json().encode())
    return index


def _survey(folder: Path, index: Index) -> None:
    """Fill in what only the samples tell: kinds, shapes, classes, statistics, tokens."""
    from dist_train.data_shards.reader import Shards

    splits = {split: Shards(folder, split, index) for split in index.splits}
    first = splits.get("train") or next(iter(splits.values()))
    for suffix, spec in index.fields.items():
        kind = suffix.rpartition(".")[2]
        if kind in decode.PICTURES:
            spec.kind, spec.dtype = "image", "uint8"
        elif kind == "npy":
            array = decode.decode_npy(first.raw(0)[spec.name])
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
    highest, limit = 0, len(index.classes) or 1_000_000
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
        shapes.add(shards.value(i, spec.name).shape)
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


def check(folder: str | Path) -> list[str]:
    """Digest every tar and sidecar of `folder` again; return one line for each difference from the index."""
    folder = Path(folder)
    index = Index.read(folder)
    found = index.misfits(folder)
    for shard in index.shards():
        path = folder / shard.file
        for part, digest in ((path, shard.sha256), (sidecar(path), shard.offsets_sha256)):
            if not part.is_file():
                found += [] if part == path else [f"{part}: missing"]
            elif sha256(part) != digest:
                found.append(f"{part}: SHA-256 differs from index.json: its content has changed")
    return found
