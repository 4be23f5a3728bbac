"""Which split a sample is in, where its source does not say: shared out by key."""

from __future__ import annotations

import re
from pathlib import Path

from dist_train.data_shards.indexing import SPLITS
from dist_train.data_shards.write import FRACTIONS, SPLIT, split_of
from dist_train.errors import UserError

DEFAULT = ",".join(f"{name}={fraction}" for name, fraction in FRACTIONS.items())


class Sharing:
    """What `--split` says: "test" puts all samples there, "train=0.9,held_out=0.1" shares them out by their key.

    It speaks for samples whose source has no splits of its own.
    """

    def __init__(self, text: str) -> None:
        self.fractions: dict[str, float] = {}
        for part in text.split(","):
            name, equals, number = part.strip().partition("=")
            try:
                fraction = float(number) if equals else 1.0
            except ValueError:
                fraction = -1
            if not SPLIT.fullmatch(name) or not 0 < fraction < float("inf"):
                raise UserError(
                    f"split '{text}': a name, or NAME=FRACTION,NAME=FRACTION like '{DEFAULT}'"
                )
            self.fractions[name] = fraction

    def __call__(self, key: str) -> str:
        return split_of(key, self.fractions)


def split_folder(root: Path, file: Path) -> tuple[str | None, Path]:
    """(the split that the first folder below `root` names, or None; the path below that)."""
    inner = file.relative_to(root)
    split = SPLITS.get(inner.parts[0].lower()) if len(inner.parts) > 1 else None
    return split, inner.relative_to(inner.parts[0]) if split else inner


def split_in_name(name: str) -> str | None:
    """The split that a word of a file's name says (`train-00000-of-00003.parquet`), or None."""
    words = re.split(r"[-_.]", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)
