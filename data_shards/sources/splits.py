"""Which split a sample is in, where its source does not say: shared out by key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dist_train.data_shards.indexing import SPLITS
from dist_train.data_shards.write import FRACTIONS, SPLIT, split_of
from dist_train.errors import UserError

DEFAULT = ",".join(f"{name}={fraction}" for name, fraction in FRACTIONS.items())

NUMBERS = re.compile(r"([-_.](\d+|of))+$")


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


class SplitFolders:
    """Which split the first folder below `root` names: `train`, `val`, `test`, ..., and beside these any other name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.told = {}
        names = [entry.name for entry in root.iterdir() if entry.is_dir()]
        if any(name.lower() in SPLITS for name in names):
            self.told = {name: SPLITS.get(name.lower(), name) for name in names}

    def __call__(self, file: Path) -> tuple[str | None, Path]:
        """(the split of a file, or None; its path below that)."""
        inner = file.relative_to(self.root)
        split = self.told.get(inner.parts[0]) if len(inner.parts) > 1 else None
        return split, inner.relative_to(inner.parts[0]) if split else inner


def splits_in_names(names: Iterable[str]) -> dict[str, str | None]:
    """The split that a word of each name says (`train-00000-of-00003`), or None.

    Beside one that says `train`, `val`, `test` or the like, any other is a split of its own (`held_out-00000`).
    """
    found = {}
    for name in names:
        words = re.split(r"[-_.]", name.lower())
        found[name] = next((SPLITS[word] for word in words if word in SPLITS), None)
    if any(found.values()):
        for name in found:
            own = NUMBERS.sub("", name)
            if found[name] is None and SPLIT.fullmatch(own):
                found[name] = own
    return found
