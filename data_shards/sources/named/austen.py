"""The six novels of Jane Austen, out of an R package."""

from __future__ import annotations

import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from dist_train.data_shards.sources.cache import cached
from dist_train.data_shards.sources.debian import unpack_package
from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.text import Document, token_source
from dist_train.data_shards.write import split_of
from dist_train.errors import UserError

PACKAGE = "r-cran-janeaustenr"
FILE = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
DIGESTS = {"Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21"}
NOVELS = (
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "persuasion",
    "pride_and_prejudice",
    "sense_and_sensibility",
)
CHAPTER = re.compile(r"(?i)chapter [ivxlc\d]+\.?$")
STRINGS, CHARACTERS, HAS_ATTRIBUTES = 16, 9, 0x200


def austen(
    block: int = 128, tokens: str = "byte", vocab_size: int | None = None, join: bool = False
) -> Source:
    """The six novels of Jane Austen, 4 million characters; splits by chapter."""
    folder = cached("austen", DIGESTS, _fetch)
    return token_source(
        "austen",
        list(chapters(folder / "Rdata.rdb")),
        f"Debian package {PACKAGE}: the texts of Project Gutenberg, by Julia Silge",
        "public domain",
        block,
        tokens,
        vocab_size,
        join,
    )


def _fetch(folder: Path) -> None:
    root = unpack_package(PACKAGE, folder / "package")
    if not (root / FILE).is_file():
        raise UserError(f"Debian package {PACKAGE} holds no {FILE}")
    shutil.move(root / FILE, folder)
    shutil.rmtree(folder / "package")


def chapters(path: Path) -> Iterator[Document]:
    """Each chapter with its own split; what stands before the first one is chapter 0."""
    for novel, lines in zip(NOVELS, read_rdb(path), strict=True):
        starts = [number for number, line in enumerate(lines) if CHAPTER.match(line.strip())]
        for chapter, (start, stop) in enumerate(
            zip([0, *starts], [*starts, len(lines)], strict=True)
        ):
            key = f"{novel}/{chapter:03d}"
            yield split_of(key), key, ("\n".join(lines[start:stop]) + "\n").encode()


def read_rdb(path: Path) -> list[list[str]]:
    """The vectors of strings in an R lazy-load data base: zlib chunks, each after its 4-byte size, of XDR."""
    content = path.read_bytes()
    vectors = []
    place = 0
    try:
        while place < len(content):
            chunk = zlib.decompressobj()
            vectors.append(read_strings(chunk.decompress(content[place + 4 :])))
            if not chunk.eof:
                raise ValueError("its end is missing")
            place = len(content) - len(chunk.unused_data)
    except (zlib.error, struct.error, ValueError) as error:
        raise UserError(f"{path}: the chunk at byte {place} cannot be read: {error}") from error
    return vectors


def read_strings(serialised: bytes) -> list[str]:
    """A vector of strings in R's XDR serialisation, version 3."""
    if serialised[:6] != b"X\n\0\0\0\3":
        raise ValueError("not R's XDR serialisation, version 3")
    (size,) = struct.unpack_from(">i", serialised, 14)  # of the name of the native encoding
    place = 18 + size
    flags, count = struct.unpack_from(">ii", serialised, place)
    if flags & 0xFF != STRINGS or flags & HAS_ATTRIBUTES:
        raise ValueError("not a plain vector of strings")
    place += 8
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", serialised, place)
        if flags & 0xFF != CHARACTERS or size < 0 or place + 8 + size > len(serialised):
            raise ValueError("a string that is not one, or is missing")
        strings.append(serialised[place + 8 : place + 8 + size].decode())
        place += 8 + size
    return strings
