"""Where data come from: real sets by name, and a user's own files, each turned into samples."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_train.data_shards.index import Index
from dist_train.data_shards.sources.arrays import idx_files, numpy_files
from dist_train.data_shards.sources.hugging_face import PREFIX, hugging_face
from dist_train.data_shards.sources.named import NAMED
from dist_train.data_shards.sources.pictures import PICTURE_FILES, image_folder
from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.tables import TABLE_FILES, tables
from dist_train.data_shards.sources.tars import web_dataset
from dist_train.data_shards.sources.text import TEXT_FILES, text_files
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError, nearest

__all__ = ["NAMED", "Source", "locate", "pack"]


def pack(
    source: str | Path | Source,
    out: str | Path,
    *,
    shard_size: int | str = "256MiB",
    records: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int | None], None] = lambda samples, total: None,
    **options: Any,
) -> Index:
    """Write a source into the new folder `out` (see `write_shards`); `progress` hears (samples written, all or None).

    `source` is a name, a path (pictures in folders named after their class, or text), or a Source of one's own.
    """
    made = source if isinstance(source, Source) else _source(source, options)
    return write_shards(
        out,
        made.name,
        made.samples,
        shard_size=shard_size,
        records=records,
        classes=made.classes,
        vocabulary=made.vocabulary,
        source=made.source,
        licence=made.licence,
        tokenizer=made.tokenizer,
        workers=workers,
        progress=lambda samples: progress(samples, made.total),
    )


def locate(data: str | Path, root: str | Path, **options: Any) -> Path:
    """The folder of shards that a recipe's `data` names.

    A named source is packed on first use into `ROOT/data/NAME` (the environment's DIST_TRAIN_DATA instead of
    `ROOT/data`); several processes may do so at once. Anything else is a path, from `root` on, that must hold tars.
    """
    if str(data) in NAMED:
        base = Path(os.environ.get("DIST_TRAIN_DATA") or Path(root) / "data")
        folder = base / "-".join([str(data), *(f"{k}={v}" for k, v in sorted(options.items()))])
        if not (folder / "index.json").is_file():
            try:
                pack(data, folder, **options)
            except UserError:
                if not (folder / "index.json").is_file():  # else another process was faster
                    raise
        return folder
    folder = Path(root) / Path(data).expanduser()
    if options:
        raise UserError(
            f"data options {sorted(options)} are for named sources ({', '.join(NAMED)}) only"
        )
    if not folder.is_dir():
        raise UserError(
            f"data '{data}': neither a named source ({', '.join(NAMED)}) nor the folder {folder}"
            f"{nearest(str(data), NAMED)}"
        )
    if not any(folder.glob("*.tar")):
        raise UserError(
            f"{folder}: holds no .tar shards; make them: dist-train shards pack {folder} OUT"
        )
    return folder


SAVED = ("dataset_dict.json", "dataset_info.json")
FORMATS: list[tuple[str, Callable[[Path], bool], Callable[..., Source]]] = [
    ("saved by Hugging Face datasets", lambda path: _has(path, SAVED), hugging_face),
    ("tars", lambda path: _has(path, ("*.tar",)), web_dataset),
    ("IDX", lambda path: _has(path, ("*idx?-ubyte", "*idx?-ubyte.gz")), idx_files),
    ("numpy", lambda path: path.suffix == ".npz" or _has(path, ("*.npy",)), numpy_files),
    ("tables", lambda path: _suffixed(path, TABLE_FILES), tables),
    ("pictures", lambda path: path.is_dir() and _suffixed(path, PICTURE_FILES), image_folder),
    ("texts", lambda path: path.is_file() or _suffixed(path, TEXT_FILES), text_files),
]
"""(what it is, whether a path is that, what reads it): the first that is, wins."""


def _source(source: str | Path, options: dict[str, Any]) -> Source:
    path = Path(source).expanduser()
    arguments: tuple[str | Path, ...] = (path,)
    if str(source) in NAMED:
        make, arguments = NAMED[str(source)], ()
    elif str(source).startswith(PREFIX):
        make, arguments = hugging_face, (str(source),)
    elif path.exists():
        found = next((reads for _, fits, reads in FORMATS if fits(path)), None)
        if found is None:
            known = ", ".join(what for what, _, _ in FORMATS)
            raise UserError(f"source '{source}': nothing in it that can be packed ({known})")
        make = found
    else:
        raise UserError(
            f"source '{source}': no such path, nor {PREFIX}OWNER/NAME, nor one of {', '.join(NAMED)}"
            f"{nearest(str(source), NAMED)}"
        )
    takes = [name for name in inspect.signature(make).parameters if name != "path"]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise UserError(
                f"source '{source}' has no option '{option}'{nearest(option, takes)} (it has {known})"
            )
    return make(*arguments, **options)


def _has(path: Path, patterns: Iterable[str]) -> bool:
    return path.is_dir() and any(any(path.glob(pattern)) for pattern in patterns)


def _suffixed(path: Path, suffixes: Iterable[str]) -> bool:
    files = path.rglob("*") if path.is_dir() else [path]
    return any(file.suffix.lower() in suffixes for file in files)
