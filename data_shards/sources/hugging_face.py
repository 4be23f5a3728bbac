"""Data sets of the Hugging Face hub, of its offline cache, or saved in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.data_shards.indexing import SPLITS
from dist_train.data_shards.sources.source import Source, name_of
from dist_train.data_shards.sources.splits import DEFAULT
from dist_train.data_shards.sources.tables import table_source
from dist_train.errors import UserError

PREFIX = "hf://"


def hugging_face(
    path: str | Path,
    config: str | None = None,
    fields: str | None = None,
    key: str | None = None,
    split: str = DEFAULT,
) -> Source:
    """A data set of the hub (`hf://OWNER/NAME`), or one that `save_to_disk` has written; its splits stay.

    Pictures are kept as they are stored, class names go into the index.
    """
    name = str(path).removeprefix(PREFIX)
    loaded = _call(name, "load_dataset", name, config) if name != str(path) else _saved(Path(path))
    sets = loaded if isinstance(loaded, dict) else {"": loaded}
    first = next(iter(sets.values()))
    names = {
        column: list(feature.names)
        for column, feature in first.features.items()
        if hasattr(feature, "names") and isinstance(feature.names, list)
    }
    parts = [
        (
            SPLITS.get(split_name.lower(), split_name.replace("-", "_")) or None,
            Path(name),
            _Rows(one),
        )
        for split_name, one in sets.items()
    ]
    licence = first.info.license or "as given by its owner"
    return table_source(name_of(Path(name)), parts, str(path), licence, fields, key, split, names)


class _Rows:
    """A data set with the few methods of an Arrow one that `table_source` uses; nothing is decoded."""

    def __init__(self, data: Any) -> None:
        self.data = data.with_format("arrow")
        self.schema = data.data.schema

    def count_rows(self) -> int:
        return len(self.data)

    def to_batches(self, columns: list[str], batch_size: int = 1024) -> Any:
        for table in self.data.select_columns(columns).iter(batch_size):
            yield from table.to_batches()


def _saved(path: Path) -> Any:
    return _call(str(path), "load_from_disk", str(path))


def load_split(name: str, split: str) -> Any:
    """One split of a data set by name, from the hub or its cache. UserError: it cannot be had."""
    return _call(name, "load_dataset", name, split=split)


def _call(name: str, function: str, *arguments: Any, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("needs datasets: pip install 'dist-train[data]'") from error
    try:
        return getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # the hub, its client and each format have exceptions of their own
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"'{name}' cannot be loaded ({type(error).__name__}: {reason})") from error
