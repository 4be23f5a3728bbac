"""Files fetched once from elsewhere: kept under their digests, and checked whenever they are used."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from dist_train.data_shards.index import sha256
from dist_train.errors import UserError

SUMS = "SHA256SUMS"


def cache_folder() -> Path:
    """Where fetched files are kept: the environment's DIST_TRAIN_CACHE, else `~/.cache/dist-train`."""
    return Path(os.environ.get("DIST_TRAIN_CACHE") or "~/.cache/dist-train").expanduser()


def cached(name: str, digests: Mapping[str, str] | None, fetch: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, with the files {file: SHA-256}; `fetch(folder)` makes them where they are not.

    Digests that cannot be known before (None) are taken when the files are fetched, and hold from then on.
    Of several processes that fetch at once one wins. UserError: a file is not the one that its digest names.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        verify(folder, digests or read_digests(folder))
        return folder
    part = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
    try:
        part.mkdir(parents=True)
        fetch(part)
        if digests is None:
            lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(part.iterdir())]
            (part / SUMS).write_text("".join(lines), encoding="ascii")
        else:
            verify(part, digests)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror} (DIST_TRAIN_CACHE names another folder to keep data in)"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def read_digests(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a cached folder whose digests were taken when it was fetched."""
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
        return {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / SUMS}: cannot be read (remove {folder} to fetch it again)"
        ) from error


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """UserError where a file of {file: SHA-256} is missing from `folder`, or is another."""
    for file, digest in digests.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path}: missing (remove {folder} to fetch it again)")
        found = sha256(path)
        if found != digest:
            raise UserError(
                f"{path}: SHA-256 {found}, expected {digest} (remove {folder} to fetch it again)"
            )


def first_of(what: str, ways: Mapping[str, Callable[[], None]]) -> None:
    """Try each way {description: call} until one does; UserError that says why each of them did not."""
    failures = []
    for way, call in ways.items():
        try:
            return call()
        except UserError as error:
            failures.append(f"{way}: {error}")
    raise UserError(f"{what} cannot be had; " + "; ".join(failures))
