"""A tokenizer trained on the texts of a set of shards, stored beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_train.data_shards import tokens
from dist_train.data_shards.index import Index, sha256
from dist_train.data_shards.publish import publish
from dist_train.data_shards.reader import Shards
from dist_train.errors import UserError


def train_tokenizer(
    folder: str | Path,
    kind: str,
    vocab_size: int | None = None,
    *,
    fields: Sequence[str] = (),
    split: str = "train",
) -> Index:
    """Train a tokenizer (see `tokens.train`) on text fields of a split, by default all; return the index that names it.

    UserError: the set has no such text, or its samples are tokens already.
    """
    folder = Path(folder)
    index = Index.load(folder)
    texts = [spec.name for spec in index.fields.values() if spec.kind == "text"]
    if any(spec.kind == "tokens" for spec in index.fields.values()):
        raise UserError(
            f"{folder}: its samples are tokens already, by the tokenizer of its packing"
        )
    for name in fields or ["text"] * (not texts):
        if name not in texts:
            known = ", ".join(texts) or "none"
            raise UserError(f"{folder}: no text field '{name}' (there are {known})")
    shards = Shards(folder, split, index)

    def contents() -> Iterator[bytes]:
        for i in range(len(shards)):
            raw = shards.raw(i)
            yield from (bytes(raw[name]) for name in fields or texts)

    tokenizer = tokens.train(kind, contents(), vocab_size)
    publish(folder / tokens.FILE, tokenizer.to_json().encode())
    index.tokenizer, index.vocabulary = sha256(folder / tokens.FILE), tokenizer.vocabulary
    index.save(folder)
    return index
