"""What every source gives: samples, and what the index should say about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_train.data_shards.tokens import Tokenizer
from dist_train.data_shards.write import FRACTIONS, Row, split_of
from dist_train.errors import UserError


@dataclass
class Source:
    """Samples, and what the index says about them; `total` is their number where that is known before."""

    name: str
    samples: Iterable[Row]
    source: str
    licence: str
    classes: list[str] | None = None
    vocabulary: int | None = None
    total: int | None = None
    tokenizer: Tokenizer | None = None


def labelled(
    images: np.ndarray,
    labels: np.ndarray,
    fractions: Mapping[str, float] = FRACTIONS,
    prefix: str = "",
) -> Iterator[Row]:
    """Rows of pictures and classes, with their number as key; `fractions` shares them out by that key."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        key = f"{prefix}{i:05d}"
        yield split_of(key, fractions), key, {"image.npy": image, "cls": int(label)}


def folder_of(path: str | Path) -> Path:
    """`path`, which must be a folder."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    return root


def name_of(root: Path) -> str:
    """The name of a data set from that of its folder or file."""
    stem = root.resolve().name.partition(".")[0] or "data"
    return "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in stem)


def key_of(inner: Path) -> str:
    """A key from a relative path: dots would end it too early."""
    return str(inner.with_suffix("")).replace(".", "_")
