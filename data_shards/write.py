"""Samples in, a folder of tar shards with their index out: the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train.data_shards import shard, tar, tokens
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import Facts, finish_index
from dist_train.data_shards.publish import publish, published
from dist_train.data_shards.sizes import UNITS
from dist_train.data_shards.tokens import Tokenizer
from dist_train.errors import UserError

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
SPLIT = re.compile(r"[A-Za-z0-9_]+")
Row = tuple[str, str, Mapping[str, Any]]
"""(split, key, {suffix: bytes | path of a file | array | int | str | JSON value})"""


def split_of(key: str, fractions: Mapping[str, float] = FRACTIONS) -> str:
    """The split of a sample as a function of its key alone: it stays there whatever else comes or goes."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"dist-train split").digest()
    place = int.from_bytes(digest, "little") / 2**64 * sum(fractions.values())
    for split, fraction in fractions.items():  # noqa: B007
        place -= fraction
        if place < 0:
            break
    return split


def write_shards(
    out: str | Path,
    name: str,
    samples: Iterable[Row],
    *,
    shard_size: int | str = "256MiB",
    records: int = 0,
    classes: list[str] | None = None,
    vocabulary: int | None = None,
    source: str = "",
    licence: str = "",
    tokenizer: Tokenizer | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda samples: None,
) -> Index:
    """Write `samples` as tars `name-split-000000.tar`, ... and their index into the new folder `out`.

    `shard_size` is a size ("256MiB") or a number of samples. With `records`, that many samples share a member a field
    (see `packed`): for small ones. `workers` threads write (None: one a core), and change nothing in what is written;
    `progress` hears how many samples were written whenever a shard is done. `out` appears whole or not at all; after a
    kill the same call goes on with the shards that were done.
    UserError: `out` is not empty, a key or a split that cannot be, a sample that lacks a field.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"name '{name}': use letters, digits, '_', '.' and '-'")
    if isinstance(records, bool) or not isinstance(records, int) or records < 0:
        raise UserError(f"records {records!r}: how many samples share a block, or 0")
    limits = _limits(shard_size)
    workers = workers or min(8, os.cpu_count() or 1)
    splits: dict[str, list[shard.Written]] = {}
    with published(Path(out)) as folder, ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[str, Future[shard.Written]]] = deque()

        def finish_one() -> None:
            split, future = waiting.popleft()
            written = future.result()
            splits.setdefault(split, []).append(written)
            progress(written.shard.samples)

        try:
            for group in _groups(samples, limits):
                path = folder / f"{name}-{group.split}-{group.number:06d}.tar"
                waiting.append(
                    (group.split, pool.submit(shard.write, path, group.samples, records))
                )
                while len(waiting) > workers:
                    finish_one()
            while waiting:
                finish_one()
        finally:
            for _, future in waiting:
                future.cancel()
        if not splits:
            raise UserError(f"'{name}': no samples to write")
        shard.remove_journals(folder, {one.shard.file for done in splits.values() for one in done})
        facts = Facts(name, classes or [], vocabulary, source, licence)
        if tokenizer is not None:
            publish(folder / tokens.FILE, tokenizer.to_json().encode())
        first = next(iter(splits.values()))[0]
        for done in splits.values():
            for one in done:
                if one.elements != first.elements:
                    raise UserError(
                        f"{one.shard.file}: arrays of {one.elements}, others have {first.elements}; "
                        "samples packed in blocks need one shape (records 0 packs them one by one)"
                    )
        shards = {split: [one.shard for one in done] for split, done in splits.items()}
        return finish_index(folder, first.suffixes, shards, facts, elements=first.elements)


@dataclass
class _Group:
    """The samples of one shard: shard `number` of its split."""

    split: str
    number: int = 0
    samples: list[shard.Sample] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    size: int = 0


def _groups(samples: Iterable[Row], limits: tuple[int, int]) -> Iterator[_Group]:
    """Samples shard by shard, each split in the order it comes in; where a shard ends depends on nothing else."""
    most_samples, most_bytes = limits
    open_groups: dict[str, _Group] = {}
    suffixes: list[str] | None = None
    for split, key, fields in samples:
        if not SPLIT.fullmatch(split):
            raise UserError(f"split '{split}' of sample '{key}': use letters, digits and '_'")
        check_key(key)
        own = sorted(fields)
        suffixes = suffixes or own
        if own != suffixes:
            raise UserError(f"sample '{key}' has the fields {own}; every sample needs {suffixes}")
        group = open_groups.setdefault(split, _Group(split))
        sample = (key, [(suffix, shard.prepare(suffix, fields[suffix])) for suffix in own])
        size = sum(tar.BLOCK + tar.padded(shard.size_of(value)) for _, value in sample[1])
        if group.samples and (len(group.samples) >= most_samples or group.size + size > most_bytes):
            yield group
            group = open_groups[split] = _Group(split, group.number + 1)
        if key in group.keys:
            raise UserError(f"key '{key}' of split '{split}': appears twice")
        group.keys.add(key)
        group.samples.append(sample)
        group.size += size
    yield from open_groups.values()


def check_key(key: str) -> None:
    """UserError: `key` cannot be the name of a sample in a tar."""
    parts = key.split("/")
    if not all(parts) or ".." in parts or "." in parts[-1] or not key.isprintable():
        raise UserError(f"key '{key}': no '.' in its last part, no '..', no empty part, printable")


def _limits(shard_size: int | str) -> tuple[int, int]:
    """(samples, bytes) that a shard may have."""
    if isinstance(shard_size, int) and not isinstance(shard_size, bool) and shard_size > 0:
        return shard_size, 1 << 62
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)", str(shard_size))
    if found and float(found[1]) > 0:
        return 1 << 62, int(float(found[1]) * UNITS[found[2]])
    raise UserError(f"shard_size {shard_size!r}: a size like 256MiB, or a number of samples")
