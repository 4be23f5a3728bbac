"""Tables in files: CSV, TSV, Parquet, JSON lines, Arrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.data_shards.sources.columns import LABELS, Field, wanted
from dist_train.data_shards.sources.source import Source, name_of
from dist_train.data_shards.sources.splits import DEFAULT, Sharing, SplitFolders, splits_in_names
from dist_train.data_shards.write import Row
from dist_train.errors import UserError

TABLE_FILES = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".arrow")
Part = tuple[str | None, Path, Any]
"""(split, or None; file; its arrow data set)"""


def tables(
    path: str | Path,
    fields: str | None = None,
    key: str | None = None,
    split: str = DEFAULT,
) -> Source:
    """Rows of a table, or of the tables in a folder, as samples; the names of files or folders, or a column `split`,
    may tell splits.

    Arguments:
        fields: which columns, and how they are stored; see `wanted`.
        key: the column whose values are the keys; else the number of the row is, and then rows that come or go may
            change the split of others.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    files = [file for file in files if file.suffix.lower() in TABLE_FILES]
    names = splits_in_names(file.stem for file in files)
    folders = None if root.is_file() else SplitFolders(root)
    parts: list[Part] = []
    for file in files:
        told = folders(file)[0] if folders else None
        parts.append((told or names[file.stem], file, _open(file)))
    if not parts:
        raise UserError(f"{root}: no tables ({', '.join(TABLE_FILES)}) in it")
    return table_source(
        name_of(root), parts, str(root), "as given by its owner", fields, key, split, {}
    )


def table_source(
    name: str,
    parts: Sequence[Part],
    source: str,
    licence: str,
    fields: str | None,
    key: str | None,
    split: str,
    class_names: dict[str, list[str]],
) -> Source:
    """A source of Arrow data sets, one a part; `class_names` {column: names} are those that a schema gave."""
    columns = list(parts[0][2].schema.names)
    for _, file, data in parts:
        if list(data.schema.names) != columns:
            raise UserError(f"{file}: has the columns {data.schema.names}, others have {columns}")
    if key is not None and key not in columns:
        raise UserError(f"key '{key}': no such column (there are {', '.join(columns)})")
    told = "split" if "split" in columns else None
    plain = [name for name in columns if name not in (key, told)]
    chosen = wanted(fields, columns if fields else plain)
    labels = {
        taken[0]
        for suffix, taken in chosen.items()
        if suffix == "cls" or (suffix.startswith("=") and taken[0].lower() in LABELS)
    }
    names = {
        column: class_names.get(column) or _texts([data for _, _, data in parts], column)
        for column in labels
    }
    taken_ones = [name for taken in chosen.values() for name in taken]
    needed = list(dict.fromkeys([*taken_ones, *filter(None, (key, told))]))
    sharing = Sharing(split)

    def samples() -> Iterator[Row]:
        makers: list[Field] = []
        number = 0
        for own, file, data in parts:
            for row in _rows(file, data, needed):
                makers = makers or [
                    Field(suffix, taken, row, names.get(taken[0], []))
                    for suffix, taken in chosen.items()
                ]
                name = f"{number:09d}" if key is None else str(row[key]).replace(".", "_")
                try:
                    fields = {maker.suffix: maker(row) for maker in makers}
                except UserError as error:
                    raise UserError(f"{file}: row '{name}': {error}") from error
                yield own or (row[told] if told else None) or sharing(name), name, fields
                number += 1

    classes = next((found for found in names.values() if found), None)
    total = _total([data for _, _, data in parts])
    return Source(name, samples(), source, licence, classes, total=total)


def _open(file: Path) -> Any:
    """The Arrow data set of one file."""
    try:
        from pyarrow import csv, dataset
    except ImportError as error:
        raise UserError("tables need pyarrow: pip install 'dist-train[data]'") from error
    kind = file.suffix.lower().removeprefix(".")
    formats = {
        "csv": dataset.CsvFileFormat(),
        "tsv": dataset.CsvFileFormat(csv.ParseOptions(delimiter="\t")),
        "parquet": "parquet",
        "arrow": "ipc",
    }
    try:
        return dataset.dataset(file, format=formats.get(kind, "json"))
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise UserError(f"{file}: not a table that can be read: {error}") from error


def _rows(file: Path, data: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    try:
        for batch in data.to_batches(columns=columns, batch_size=1024):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _texts(datas: list[Any], column: str) -> list[str]:
    """The distinct values of a column of text, sorted; none if it is one of numbers."""
    found: set[Any] = set()
    for data in datas:
        for batch in data.to_batches(columns=[column]):
            found.update(batch.column(0).unique().to_pylist())
    return sorted(found) if all(isinstance(value, str) for value in found) else []


def _total(datas: list[Any]) -> int:
    return sum(data.count_rows() for data in datas)
