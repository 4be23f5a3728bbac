"""Translations of Debian's package descriptions, by volunteers: pairs of short lines and of paragraphs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from dist_train.data_shards.sources.cache import cached, read_digests
from dist_train.data_shards.sources.debian import fetch_descriptions
from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.tokens import train
from dist_train.data_shards.write import Row, split_of
from dist_train.errors import UserError

Description = tuple[str, list[str]]
"""(the short line, paragraphs)"""


def ddtp_en_fr(
    words: int | None = None, tokens: str = "byte", vocab_size: int | None = None
) -> Source:
    """Debian's package descriptions in English and French: pairs of short lines and paragraphs.

    Args:
        words: pairs with more words than this on either side are left out; none, if not given.
        tokens: the tokenizer that is kept beside the shards, one for both languages; `vocab_size` is for "bpe".
    """
    return _ddtp("fr", words, tokens, vocab_size)


def ddtp_en_de(
    words: int | None = None, tokens: str = "byte", vocab_size: int | None = None
) -> Source:
    """Debian's package descriptions in English and German; arguments as those of `ddtp_en_fr`."""
    return _ddtp("de", words, tokens, vocab_size)


def _ddtp(language: str, words: int | None, tokens: str, vocab_size: int | None) -> Source:
    name = f"ddtp-en-{language}"
    if words is not None and words < 1:
        raise UserError(f"{name}: words {words} must be 1 or more")
    folder = cached(name, None, lambda into: fetch_descriptions(("en", language), into))
    english, other = (folder / f"Translation-{code}" for code in ("en", language))
    digest = read_digests(folder)[other.name]
    rows = [
        row
        for row in pairs(english, other, language)
        if words is None or all(len(str(text).split()) <= words for text in row[2].values())
    ]
    learnt = (
        str(text).encode() for split, _, row in rows if split == "train" for text in row.values()
    )
    tokenizer = train(tokens, learnt, vocab_size)
    return Source(
        name,
        rows,
        f"Debian's main/i18n/Translation-en and -{language}, the latter of SHA-256 {digest}",
        "the licence of each package described; translations by the Debian Description Translation Project",
        vocabulary=tokenizer.vocabulary,
        total=len(rows),
        tokenizer=tokenizer,
    )


def pairs(english: Path, other: Path, language: str) -> Iterator[Row]:
    """Each English text once, with its translation; the key is its digest, so that a split depends on nothing else."""
    originals = dict(descriptions(english))
    seen = set()
    for md5, (short, paragraphs) in descriptions(other):
        if md5 not in originals:
            continue
        original, original_paragraphs = originals[md5]
        found = [(original, short)]
        if len(paragraphs) == len(original_paragraphs):
            found += zip(original_paragraphs, paragraphs, strict=True)
        for source, target in found:
            key = hashlib.sha256(source.encode()).hexdigest()[:24]
            if key not in seen and source and target and source != target:
                seen.add(key)
                yield split_of(key), key, {"en.txt": source, f"{language}.txt": target}


def descriptions(path: Path) -> Iterator[tuple[str, Description]]:
    """(Description-md5, description) of each stanza of a Translation file."""
    for stanza in path.read_text(encoding="utf-8").split("\n\n"):
        lines = stanza.split("\n")
        fields = dict(line.split(": ", 1) for line in lines if line[:1] != " " and ": " in line)
        short = next((fields[name] for name in fields if _is_text(name)), None)
        if short is not None and "Description-md5" in fields:
            text = "\n".join(line[1:] for line in lines if line.startswith(" "))
            yield fields["Description-md5"], (short.strip(), list(_paragraphs(text)))


def _is_text(field: str) -> bool:
    return field.startswith("Description-") and field != "Description-md5"


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs as one line each; one with lines set as they are (lists, tables) is empty, and so not paired."""
    for paragraph in text.split("\n.\n"):
        lines = paragraph.split("\n")
        yield "" if any(line.startswith(" ") for line in lines) else " ".join(lines).strip()
