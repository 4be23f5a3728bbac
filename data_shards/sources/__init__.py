"""Where data come from: real sets by name, and a user's own files, each turned into samples."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.data_shards.index import Index
from dist_train.data_shards.sources.named import NAMED
from dist_train.data_shards.sources.pictures import PICTURE_FILES, image_folder
from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.text import text_files
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError, nearest

__all__ = ["NAMED", "Source", "locate", "pack"]


def pack(
    source: str | Path | Source,
    out: str | Path,
    *,
    shard_size: int | str = "256MiB",
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
        classes=made.classes,
        vocabulary=made.vocabulary,
        source=made.source,
        licence=made.licence,
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


def _source(source: str | Path, options: dict[str, Any]) -> Source:
    path = Path(source).expanduser()
    if str(source) in NAMED:
        make: Callable[..., Source] = NAMED[str(source)]
        arguments: tuple[Path, ...] = ()
    elif path.exists():
        pictures = path.is_dir() and any(f.suffix.lower() in PICTURE_FILES for f in path.rglob("*"))
        make, arguments = (image_folder if pictures else text_files), (path,)
    else:
        raise UserError(
            f"source '{source}': no such path, nor one of {', '.join(NAMED)}{nearest(str(source), NAMED)}"
        )
    takes = [name for name in inspect.signature(make).parameters if name != "path"]
    for option in options:
        if option not in takes:
            known = ", ".join(takes) or "none"
            raise UserError(f"source '{source}' has no option '{option}' (it has {known})")
    return make(*arguments, **options)
