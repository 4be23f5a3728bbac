"""Text, cut into pieces of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dist_train.data_shards.sources.source import Source, folder_of, key_of, name_of, split_folder
from dist_train.data_shards.write import FRACTIONS, Row
from dist_train.errors import UserError

TEXT_FILES = (".txt", ".md", ".rst", ".text")
Document = tuple[str | None, str, bytes]
"""(split, or None; key; text)"""


def text_files(path: str | Path, block: int = 128) -> Source:
    """Text files, a byte a token, from `train`, `validation`, `test` folders, else shared out 80, 10, 10 % by size.

    A single file is cut in that proportion.
    """
    root = Path(path)
    documents: list[Document]
    if root.is_file():
        text = root.read_bytes()
        cuts = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
        documents = [
            (split, key_of(Path(root.name)), text[cuts[i] : cuts[i + 1]])
            for i, split in enumerate(FRACTIONS)
        ]
    else:
        root = folder_of(path)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in TEXT_FILES)
        if not files:
            raise UserError(f"{root}: no text files ({', '.join(TEXT_FILES)}) in it")
        documents = []
        for file in files:
            split, inner = split_folder(root, file)
            documents.append((split, key_of(inner), file.read_bytes()))
    return Source(
        name_of(root),
        pieces(shared_out(documents), block),
        str(root),
        "as given by its owner",
        vocabulary=256,
    )


def shared_out(documents: list[Document]) -> list[tuple[str, str, bytes]]:
    """Give each document without a split, in order, to the one that is then the least full for its fraction.

    Documents differ so much in size that a hash of their names could leave a split nearly empty.
    """
    filled = dict.fromkeys(FRACTIONS, 0)
    shared = []
    for split, key, text in documents:
        if split is None:
            split = min(FRACTIONS, key=lambda name: (filled[name] + len(text)) / FRACTIONS[name])
            filled[split] += len(text)
        shared.append((split, key, text))
    return shared


def pieces(documents: Iterable[tuple[str, str, bytes]], block: int) -> Iterator[Row]:
    """Cut each (split, key, text) into pieces of block + 1 bytes, one byte of which the next shares.

    So every byte of a text but its first is a target once. The last piece is shorter; one without target is dropped.
    """
    if not isinstance(block, int) or block < 1:
        raise UserError(f"block {block!r}: a whole number of at least 1")
    for split, key, text in documents:
        tokens = np.frombuffer(text, np.uint8)
        for number, start in enumerate(range(0, len(tokens) - 1, block)):
            piece = tokens[start : start + block + 1]
            yield split, f"{key}-{number:05d}", {"tokens.npy": piece}
