"""An existing WebDataset, packed again: into shards of another size, or with fewer fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.data_shards import decode, packed, tar, tokens
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import in_order, split_names
from dist_train.data_shards.sources.columns import wanted
from dist_train.data_shards.sources.source import Source, folder_of, name_of
from dist_train.data_shards.write import Row
from dist_train.errors import UserError


def web_dataset(path: str | Path, fields: str | None = None) -> Source:
    """The tars of a folder; names of files tell splits, an index beside them what it knows. Keys stay.

    `fields` names the suffixes to keep, and may give them others: "jpg,cls", "image.jpg=jpg".
    """
    root = folder_of(path)
    paths = sorted(root.glob("*.tar"), key=in_order)
    splits = split_names([file.name for file in paths])
    index = Index.parse(root / "index.json") if (root / "index.json").is_file() else None
    for split, shards in index.splits.items() if index else ():
        splits.update({shard.file: split for shard in shards})

    def samples() -> Iterator[Row]:
        chosen: dict[str, list[str]] = {}
        for file in paths:
            for key, found in _samples(file):
                chosen = chosen or wanted(fields, list(found))
                if not {of[0] for of in chosen.values()} <= set(found):
                    raise UserError(f"{file}: sample '{key}' has {list(found)}, others {chosen}")
                kept = {to.removeprefix("="): found[of[0]] for to, of in chosen.items()}
                yield splits[file.name], key, kept

    if not paths:
        raise UserError(f"{root}: no .tar files in it")
    if index is None:
        return Source(name_of(root), samples(), str(root), "as given by its owner")
    numbered = index.classes == [str(number) for number in range(len(index.classes))]
    return Source(
        index.name,
        samples(),
        index.source,
        index.licence,
        None if numbered else index.classes,
        index.vocabulary,
        total=sum(shard.samples for shard in index.shards()),
        tokenizer=tokens.load(root) if index.tokenizer else None,
    )


def _samples(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, {suffix: value}) of each sample of a tar, also of those that stand in blocks."""
    suffixes, table = tar.scan(file)
    assert suffixes is not None
    keys, elements = tar.keys(file), packed.Elements()
    if packed.is_packed(file):
        suffixes, table, elements = packed.expand(file, suffixes, table)
        keys = iter(packed.keys(file))
    with file.open("rb") as content:
        for key, row in zip(keys, table, strict=True):
            found: dict[str, Any] = {}
            for suffix, (offset, size) in zip(suffixes, row.tolist(), strict=True):
                content.seek(offset)
                found[suffix] = content.read(size)
                if suffix in elements:
                    array = decode.decode_elements(memoryview(found[suffix]), *elements[suffix])
                    found[suffix] = int(array) if suffix == "cls" else array
            yield key, found
