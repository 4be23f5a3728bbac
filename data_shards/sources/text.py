"""Text, cut into pieces of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dist_train.data_shards import tokens as tokenizers
from dist_train.data_shards.sources.source import Source, folder_of, key_of, name_of
from dist_train.data_shards.sources.splits import DEFAULT, Sharing, SplitFolders
from dist_train.data_shards.write import Row
from dist_train.errors import UserError

TEXT_FILES = (".txt", ".md", ".rst", ".text")
Document = tuple[str, str, bytes]
"""(split, key, text)"""


def text_files(
    path: str | Path,
    block: int = 128,
    tokens: str = "byte",
    vocab_size: int | None = None,
    join: bool = False,
    split: str = DEFAULT,
) -> Source:
    """Text files as pieces of tokens, from folders of splits (`train`, ...), else shared out by name.

    A single file is cut in the proportions of `split`, in that order. See `token_source` for the options.
    """
    root = Path(path)
    sharing = Sharing(split)
    if root.is_file():
        documents = _cut(root, sharing.fractions)
    else:
        root = folder_of(path)
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in TEXT_FILES)
        if not files:
            raise UserError(f"{root}: no text files ({', '.join(TEXT_FILES)}) in it")
        documents, split_folder = [], SplitFolders(root)
        for file in files:
            own, inner = split_folder(file)
            key = key_of(inner)
            documents.append((own or sharing(key), key, file.read_bytes()))
    return token_source(
        name_of(root),
        documents,
        str(root),
        "as given by its owner",
        block,
        tokens,
        vocab_size,
        join,
    )


def token_source(
    name: str,
    documents: list[Document],
    source: str,
    licence: str,
    block: int,
    tokens: str,
    vocab_size: int | None,
    join: bool,
) -> Source:
    """Pieces of `block` + 1 tokens, one of which the next shares: every token but the first is a target once.

    `tokens` is byte, character or bpe (that of `vocab_size` ids); the latter two are trained on the split `train`. With
    `join` pieces run on over the ends of documents, with the boundary's id between two, so that none but the last of a
    split is shorter; else a document's last piece is shorter, and one without target is dropped.
    """
    if not isinstance(block, int) or block < 1:
        raise UserError(f"block {block!r}: a whole number of at least 1")
    texts = (text for split, _, text in documents if split == "train")
    tokenizer = tokenizers.train(tokens, texts, vocab_size)
    plain = isinstance(tokenizer, tokenizers.ByteTokenizer) and not join
    make = _joined if join else _pieces
    return Source(
        name,
        make(documents, block, tokenizer, np.dtype(np.uint8) if plain else tokenizer.dtype),
        source,
        licence,
        vocabulary=256 if plain else tokenizer.vocabulary,
        tokenizer=None if plain else tokenizer,
    )


def _pieces(
    documents: Iterable[Document], block: int, tokenizer: tokenizers.Tokenizer, dtype: np.dtype
) -> Iterator[Row]:
    for split, key, text in documents:
        for number, piece in enumerate(_cuts(tokenizer.encode(text).astype(dtype), block)):
            yield split, f"{key}-{number:05d}", {"tokens.npy": piece}


def _joined(
    documents: Iterable[Document], block: int, tokenizer: tokenizers.Tokenizer, dtype: np.dtype
) -> Iterator[Row]:
    boundary = np.array([tokenizer.boundary], dtype)
    rest: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def row(split: str, piece: np.ndarray) -> Row:
        counts[split] = counts.get(split, -1) + 1
        return split, f"{split}-{counts[split]:07d}", {"tokens.npy": piece}

    for split, _, text in documents:
        before = rest.get(split, boundary[:0])
        ids = np.concatenate([before, tokenizer.encode(text).astype(dtype), boundary])
        whole = (len(ids) - 1) // block
        for number in range(whole):
            yield row(split, ids[number * block : (number + 1) * block + 1])
        rest[split] = ids[whole * block :]
    for split, ids in rest.items():
        if len(ids) > 1:
            yield row(split, ids)


def _cuts(ids: np.ndarray, block: int) -> Iterator[np.ndarray]:
    for start in range(0, len(ids) - 1, block):
        yield ids[start : start + block + 1]


def _cut(file: Path, fractions: dict[str, float]) -> list[Document]:
    text = file.read_bytes()
    total = sum(fractions.values())
    documents, start, share = [], 0, 0.0
    for split, fraction in fractions.items():
        share += fraction
        stop = len(text) if split == list(fractions)[-1] else int(len(text) * share / total)
        documents.append((split, key_of(Path(file.name)), text[start:stop]))
        start = stop
    return documents
