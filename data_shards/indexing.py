"""Make the index of a folder of tar shards, and compare one with what lies beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_train.data_shards import decode, packed, tar, tokens
from dist_train.data_shards.index import Field, Index, LeftOut, Shard, sha256, sidecar
from dist_train.data_shards.publish import alone, publish
from dist_train.data_shards.survey import survey, undecodable
from dist_train.errors import UserError, nearest

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
OURS = re.compile(r"(.+)-([A-Za-z0-9_]+)-\d{6}\.tar")
ON_DAMAGE = ("stop", "skip")


@dataclass
class Facts:
    """What only the maker of a data set knows of it."""

    name: str
    classes: list[str] = field(default_factory=list)
    vocabulary: int | None = None
    source: str = ""
    licence: str = ""


def index_shards(
    folder: str | Path,
    *,
    facts: Facts | None = None,
    on_damage: str = "stop",
    decode_all: bool = False,
) -> Index:
    """Read every tar of `folder` and write its index there.

    An index that is there already gives the names, classes, licence and splits that the tars do not tell. `decode_all`
    reads every sample. What is wrong is a UserError that names shard, key and byte; with `on_damage` "skip" it is
    left out, and stands in the index.
    """
    folder = Path(folder)
    if on_damage not in ON_DAMAGE:
        raise UserError(
            f"on_damage '{on_damage}'{nearest(on_damage, ON_DAMAGE)} (use {', '.join(ON_DAMAGE)})"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards")
    paths = sorted(folder.glob("*.tar"), key=in_order)
    if not paths:
        raise UserError(
            f"{folder}: holds no .tar shards (dist-train shards pack SOURCE OUT makes them)"
        )
    for path in paths:
        if path.is_symlink():
            raise UserError(f"{path}: is a link; shards are plain files")
    old = Index.parse(folder / "index.json") if (folder / "index.json").is_file() else None
    known = {shard.file: (split, shard) for split, shards in _splits(old) for shard in shards}
    names = split_names([path.name for path in paths])
    left_out: list[LeftOut] | None = [] if on_damage == "skip" else None
    suffixes: list[str] | None = list(old.fields) if old else None
    splits: dict[str, list[Shard]] = {}
    elements: packed.Elements = {}
    for path in paths:
        split, before = known.get(path.name, (names[path.name], None))
        found = _scan(path, suffixes, before, left_out, elements)
        if found is None:
            continue
        suffixes, shard = found
        copy = next(
            (other for other in splits.get(split, []) if other.sha256 == shard.sha256), None
        )
        if copy is not None:
            raise UserError(f"{path}: the same bytes as {copy.file}: one of them is a copy")
        splits.setdefault(split, []).append(shard)
    if suffixes is None or not splits:
        reasons = "; ".join(lost.reason for lost in left_out or [])
        raise UserError(f"{folder}: no sample is whole: {reasons}")
    if facts is None:
        facts = _facts(folder, old)
    return finish_index(
        folder,
        suffixes,
        splits,
        facts,
        elements=elements,
        left_out=left_out,
        decode_all=decode_all,
    )


def first_index(folder: Path, on_damage: str) -> Index:
    """Make the index that a reader misses: one process of this folder at a time, the others take what it made."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards")
    with alone(folder, f" (its index can be made before: dist-train shards index {folder})"):
        if (folder / "index.json").is_file():
            index = Index.read(folder)
            if not index.misfits(folder) and (index.decoded or on_damage == "stop"):
                return index
        return index_shards(folder, on_damage=on_damage, decode_all=on_damage == "skip")


def finish_index(
    folder: Path,
    suffixes: list[str],
    splits: dict[str, list[Shard]],
    facts: Facts,
    *,
    elements: packed.Elements | None = None,
    left_out: list[LeftOut] | None = None,
    decode_all: bool = False,
) -> Index:
    """Write the index of shards whose tables are there; what only the samples tell is read from them."""
    names = [decode.field_name(suffix) for suffix in suffixes]
    for name in names:
        if names.count(name) > 1:
            twice = [suffix for suffix in suffixes if decode.field_name(suffix) == name]
            raise UserError(f"{folder}: {' and '.join(twice)} are both the field '{name}'")
    order = [*dict.fromkeys(SPLITS.values()), *sorted(splits)]
    index = Index(
        name=facts.name,
        fields={suffix: _field(suffix, elements or {}) for suffix in suffixes},
        splits={split: splits[split] for split in dict.fromkeys(order) if split in splits},
        classes=list(facts.classes),
        vocabulary=facts.vocabulary,
        source=facts.source,
        licence=facts.licence,
        tokenizer=sha256(folder / tokens.FILE) if (folder / tokens.FILE).is_file() else None,
        left_out=left_out or [],
        decoded=decode_all,
    )
    if decode_all:
        _leave_out(folder, index, strict=left_out is None)
    survey(folder, index)
    index.save(folder)
    return index


def _field(suffix: str, elements: packed.Elements) -> Field:
    name = decode.field_name(suffix)
    if suffix not in elements:
        return Field(name, "bytes")
    dtype, shape = elements[suffix]
    return Field(name, "bytes", str(np.dtype(dtype)), shape, raw=True)


def _scan(
    path: Path,
    suffixes: list[str] | None,
    before: Shard | None,
    left_out: list[LeftOut] | None,
    elements: packed.Elements,
) -> tuple[list[str], Shard] | None:
    """(suffixes, shard) of one tar whose table is written beside it; None if no sample of it is whole."""
    lost: tar.Lost | None = None if left_out is None else []
    in_blocks = packed.is_packed(path)
    found, table = tar.scan(path, None if in_blocks else suffixes, lost)
    if in_blocks and found is not None and len(table):
        found, table, own = packed.expand(path, found, table)
        if suffixes not in (None, found) or (elements and elements != own):
            raise UserError(
                f"{path}: has the fields {found} of {own}, others have {suffixes} of {elements}"
            )
        elements |= own
    if lost and left_out is not None:
        known = [count for count, _ in lost if count is not None and not in_blocks]
        samples = sum(known) if len(known) == len(lost) else None
        if before is not None:
            samples = before.samples - len(table)
        left_out.append(LeftOut(path.name, samples, "; ".join(reason for _, reason in lost)))
    if found is None or not len(table):
        return None
    return found, _shard(path, table)


def _shard(path: Path, table: np.ndarray) -> Shard:
    offsets = decode.encode("npy", table)
    publish(sidecar(path), offsets)
    return Shard(
        path.name,
        len(table),
        path.stat().st_size,
        sha256(path),
        hashlib.sha256(offsets).hexdigest(),
    )


def _leave_out(folder: Path, index: Index, strict: bool) -> None:
    """Decode every sample; those that cannot be are an error, or lose their row in the table of their shard."""
    dtypes: dict[str, np.dtype | None] = {}
    for split, shards in list(index.splits.items()):
        kept = []
        for shard in shards:
            damaged = undecodable(folder, split, shard, index, dtypes)
            if damaged and strict:
                raise UserError(next(iter(damaged.values())))
            if damaged:
                path = folder / shard.file
                table = np.load(sidecar(path), allow_pickle=False)
                rest = np.delete(table, list(damaged), axis=0)
                index.left_out.append(
                    LeftOut(shard.file, len(damaged), "; ".join(damaged.values()))
                )
                if not len(rest):
                    continue
                shard = _shard(path, rest)
            kept.append(shard)
        index.splits[split] = kept
    index.splits = {split: shards for split, shards in index.splits.items() if shards}
    if not index.splits:
        raise UserError(f"{folder}: no sample can be decoded: {index.left_out[0].reason}")


def split_names(files: list[str]) -> dict[str, str]:
    """The split of each tar by its name: `pets-val-000001.tar`, `test-00.tar`; without one it is for training.

    Beside `NAME-train-000000.tar` and the like, any word in that place is a split: `NAME-held_out-000000.tar`.
    """
    found = {file: split_of_file(file) for file in files}
    ours = {file: match for file in files if (match := OURS.fullmatch(file))}
    sets = {match[1] for match in ours.values() if match[2].lower() in SPLITS}
    for file, match in ours.items():
        if match[1] in sets and match[2].lower() not in SPLITS:
            found[file] = match[2]
    return found


def split_of_file(name: str) -> str:
    """The split that a word of a tar's name tells; without one it is for training."""
    words = re.split(r"[-_.]", name.lower().removesuffix(".tar"))
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), "train")


def in_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key of file names: numbers by value, words by letter."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", path.name)
        if part
    ]


def check(folder: str | Path) -> list[str]:
    """Digest every tar and sidecar of `folder` again; return one line for each difference from the index."""
    folder = Path(folder)
    index = Index.read(folder)
    found = index.misfits(folder)
    if index.tokenizer is not None:
        path = folder / tokens.FILE
        if not path.is_file() or sha256(path) != index.tokenizer:
            found.append(f"{path}: missing, or changed since the index was written")
    for shard in index.shards():
        path = folder / shard.file
        for part, digest in ((path, shard.sha256), (sidecar(path), shard.offsets_sha256)):
            if not part.is_file():
                found += [] if part == path else [f"{part}: missing"]
            elif sha256(part) != digest:
                found.append(f"{part}: SHA-256 differs from index.json: its content has changed")
    return found


def _splits(index: Index | None) -> list[tuple[str, Sequence[Shard]]]:
    return [] if index is None else list(index.splits.items())


def _facts(folder: Path, old: Index | None) -> Facts:
    if old is None:
        return Facts(folder.resolve().name)
    numbered = old.classes == [str(number) for number in range(len(old.classes))]
    classes = [] if numbered else old.classes  # numbers come from the labels, and may be more now
    return Facts(old.name, classes, old.vocabulary, old.source, old.licence)
