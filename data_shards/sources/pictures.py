"""Pictures in folders that name their class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dist_train.data_shards.sources.source import Source, folder_of, key_of, name_of
from dist_train.data_shards.sources.splits import DEFAULT, Sharing, SplitFolders
from dist_train.data_shards.write import Row
from dist_train.errors import UserError

PICTURE_FILES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


def image_folder(path: str | Path, split: str = DEFAULT) -> Source:
    """Pictures in folders named after their class; those may stand in folders of splits (`train`, ...).

    Files are kept as they are. Where formats are mixed all take the suffix of the first (readers go by the content).
    """
    root = folder_of(path)
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURE_FILES)
    if not files:
        raise UserError(f"{root}: no pictures ({', '.join(PICTURE_FILES)}) in it")
    suffix = PICTURE_FILES[files[0].suffix.lower()]
    split_folder = SplitFolders(root)
    places = [(file, *split_folder(file)) for file in files]
    for file, _, inner in places:
        if len(inner.parts) < 2:
            raise UserError(f"{file}: must be in a folder that names its class")
    classes = sorted({inner.parts[0] for _, _, inner in places})

    sharing = Sharing(split)

    def samples() -> Iterator[Row]:
        for file, own, inner in places:
            key = key_of(inner)
            fields = {suffix: file, "cls": classes.index(inner.parts[0])}
            yield own or sharing(key), key, fields

    return Source(
        name_of(root), samples(), str(root), "as given by its owner", classes, total=len(places)
    )
