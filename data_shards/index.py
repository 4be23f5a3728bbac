"""The index beside a folder of tar shards: what it holds, where, and how to tell that it is still that."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.data_shards.publish import publish
from dist_train.data_shards.shard_table import LARGE, Shard, ShardTable, samples_of, to_npy
from dist_train.errors import UserError, nearest

VERSION = 1
Find = Callable[[str, str, int], Path]
"""From (name, SHA-256, size) of a file to where it is on this machine."""


@dataclass
class Field:
    """One file of each sample. `shape` has None where samples differ; `kind` is what a batch makes of it.

    `raw` is that of packed samples: the bytes are the elements of an array, without a header.
    """

    name: str
    kind: str  # image | array | tokens | label | text | json | bytes
    dtype: str | None = None
    shape: list[int | None] | None = None
    raw: bool = False


@dataclass
class LeftOut:
    """Samples of a damaged shard that are not in its table, and why; `samples` is None where nobody can know."""

    file: str
    samples: int | None
    reason: str

    def __str__(self) -> str:
        count = "an unknown number of" if self.samples is None else str(self.samples)
        return f"{count} samples of {self.file} ({self.reason})"


@dataclass
class Index:
    """All that `index.json` says.

    `tokens` counts targets: a piece of n tokens has n - 1. `tokenizer` is the SHA-256 of `tokenizer.json`. `decoded`:
    every sample was read when the index was made.
    """

    name: str
    fields: dict[str, Field]
    splits: dict[str, Sequence[Shard]]
    classes: list[str] = field(default_factory=list)
    statistics: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    vocabulary: int | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    tokenizer: str | None = None
    left_out: list[LeftOut] = field(default_factory=list)
    decoded: bool = False
    version: int = VERSION

    @classmethod
    def load(cls, folder: str | Path, on_damage: str = "stop") -> Index:
        """Read the index of `folder`, making it first where there is none; every tar must have the size it names.

        With `on_damage` "skip" it must be of samples each of which was read: else a new one is made, once, that leaves
        out what is damaged.
        """
        folder = Path(folder)
        if (folder / "index.json").is_file():
            index = cls.read(folder)
            problems = index.misfits(folder)
            if not problems and (index.decoded or on_damage == "stop"):
                return index
            if on_damage == "stop":
                again = f"dist-train shards index {folder}"
                raise UserError(f"{problems[0]} (if that is meant: {again})")
        from dist_train.data_shards.indexing import first_index

        return first_index(folder, on_damage)

    @classmethod
    def read(cls, folder: Path, find: Find | None = None) -> Index:
        """Read `index.json` alone, without a look at the tars; it must be as it was written.

        `find` gives the files of large splits, which else stand beside it.
        """
        path = folder / "index.json"
        index = cls.parse(path, find)
        if path.read_text(encoding="utf-8") != index.to_json():
            raise UserError(
                f"{path}: changed since it was written (if that is meant: dist-train shards index {folder})"
            )
        return index

    @classmethod
    def parse(cls, path: Path, find: Find | None = None) -> Index:
        """What an `index.json` says, even if someone has changed it."""

        def listed(shards: Any) -> Sequence[Shard]:
            if isinstance(shards, list):
                return [Shard(**shard) for shard in shards]
            name, sha256, size = str(shards["file"]), str(shards["sha256"]), int(shards["bytes"])
            if Path(name).name != name:
                raise UserError(f"{path}: '{name}' leads out of the folder")
            file = path.parent / name if find is None else find(name, sha256, size)
            return ShardTable.load(file, sha256)

        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise UserError(f"{path}: version {data['version']}; this program reads {VERSION}")
            del data["digest"]
            data["fields"] = {suffix: Field(**spec) for suffix, spec in data["fields"].items()}
            data["splits"] = {split: listed(shards) for split, shards in data["splits"].items()}
            data["left_out"] = [LeftOut(**lost) for lost in data["left_out"]]
            index = cls(**data)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: not an index of shards ({error!r}); dist-train shards index {path.parent} makes one"
            ) from error
        for shards in index.splits.values():
            for shard in shards if isinstance(shards, list) else ():
                if Path(shard.file).name != shard.file:
                    raise UserError(f"{path}: '{shard.file}' leads out of the folder")
        return index

    def save(self, folder: Path) -> None:
        """Write `index.json`, and the shards of large splits beside it."""
        for split, shards in self.splits.items():
            if len(shards) > LARGE and not isinstance(shards, ShardTable):
                path, content = folder / f"index.{split}.npy", to_npy(shards)
                publish(path, content)
                self.splits[split] = ShardTable.load(path, hashlib.sha256(content).hexdigest())
        publish(folder / "index.json", self.to_json().encode())

    def shards(self) -> Iterator[Shard]:
        """The shards of all splits."""
        return itertools.chain.from_iterable(self.splits.values())

    def split(self, split: str) -> Sequence[Shard]:
        """The shards of one split."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise UserError(
                f"data '{self.name}' has no split '{split}'{nearest(split, self.splits)} (it has {known})"
            )
        return self.splits[split]

    def samples(self, split: str) -> int:
        """How many samples a split has."""
        return int(samples_of(self.split(split)).sum())

    def misfits(self, folder: Path) -> list[str]:
        """What differs between the index and the files of `folder`, as far as names and sizes tell."""
        sizes = {path.name: path.lstat().st_size for path in folder.glob("*.tar")}
        found = []
        for shard in self.shards():
            path, size = folder / shard.file, sizes.pop(shard.file, None)
            if size is None:
                found.append(f"{path}: named in index.json, but missing")
            elif path.is_symlink():
                found.append(f"{path}: is a link; shards are plain files")
            elif size != shard.bytes:
                found.append(f"{path}: has {size} bytes, {shard.bytes} when it was indexed")
        for lost in self.left_out:  # of some nothing was whole
            sizes.pop(lost.file, None)
        return found + [f"{folder / name}: not in index.json" for name in sorted(sizes)]

    def to_json(self) -> str:
        """The text of `index.json`: all values, and a digest of them."""
        values = {**self._values(), "digest": self.fingerprint}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the index says, and so of every byte of the data."""
        values = json.dumps(self._values(), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(dataclasses.replace(self, splits={}))
        values["splits"] = {split: _listed(split, shards) for split, shards in self.splits.items()}
        for spec in values["fields"].values():
            if not spec["raw"]:
                del spec["raw"]
        if not values["decoded"]:
            del values["decoded"]
        return values

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


def _listed(split: str, shards: Sequence[Shard]) -> Any:
    if not isinstance(shards, ShardTable):
        return [dataclasses.asdict(shard) for shard in shards]
    return {"file": f"index.{split}.npy", "bytes": shards.size, "sha256": shards.sha256}


def sidecar(shard: Path) -> Path:
    """Where the table of offsets of a shard stands."""
    return shard.with_suffix(".index.npy")


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
