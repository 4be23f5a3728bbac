"""Files behind an address (https, s3, gs), read through fsspec with limits of time and size, and retries."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from dist_train.errors import UserError, nearest

PACKAGES = {"https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""What fsspec needs for each protocol."""
EXTRAS = {"https": "remote", "http": "remote", "s3": "s3", "gs": "gs"}
HERE = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?")
BLOCK = 1 << 20
CONNECT = 10.0
"""Seconds until a connection must stand."""


@dataclass(frozen=True)
class Patience:
    """How long a source may fail: `stall` seconds without a byte end an attempt; between attempts the wait doubles."""

    attempts: int = 6
    stall: float = 30.0
    wait: float = 0.5


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path


def check_address(address: str) -> None:
    """UserError unless `address` is one that data may come from."""
    protocol, _, rest = address.partition("://")
    host = rest.partition("/")[0]
    told = address.replace(f"{host.rpartition('@')[0]}@", "...@") if "@" in host else address
    if protocol == "http" and HERE.fullmatch(host):
        return
    if protocol not in ("https", "s3", "gs"):
        raise UserError(
            f"{told}: expected a folder, or an address that begins with https://, s3:// or gs://"
            + nearest(protocol, PACKAGES)
        )
    if not host or "@" in host or re.search(r"[?#\s]|(^|/)\.\.?(/|$)", rest):
        raise UserError(
            f"{told}: expected an address without user, '?', '#' or '..'; keys and tokens stand in the "
            "environment or the files of the service's own tools"
        )


def read(address: str, most: int, patience: Patience = Patience()) -> bytes:
    """A small file, of at most `most` bytes."""
    whole = bytearray()

    def attempt() -> None:
        whole.clear()
        with _opened(address, 0, patience) as (file, _):
            while block := file.read(BLOCK):
                whole.extend(block)
                if len(whole) > most:
                    raise UserError(f"{address}: has more than {most:,} bytes")

    _retried(attempt, address, patience)
    return bytes(whole)


def download(
    address: str, target: BinaryIO, size: int, sha256: str, patience: Patience = Patience()
) -> None:
    """Write the file at `address` to `target`; it must have this size and digest.

    A connection that breaks goes on where it broke. Content that is not what the index says is thrown away and asked
    for again, like any failure `patience.attempts` times in all, and then a UserError.
    """
    digest, have = hashlib.sha256(), 0

    def attempt() -> None:
        nonlocal digest, have
        with _opened(address, have, patience) as (file, start):
            if start != have:  # the server began at the beginning
                digest, have = hashlib.sha256(), 0
            target.seek(have)
            while have < size + 1 and (block := file.read(min(BLOCK, size + 1 - have))):
                digest.update(block)
                target.write(block)
                have += len(block)
        if have < size:
            raise OSError(f"the connection ended after {have:,} of {size:,} bytes")
        if have > size or digest.hexdigest() != sha256:
            found = f"more than {size:,} bytes" if have > size else "another SHA-256"
            digest, have = hashlib.sha256(), 0
            raise OSError(f"it sends {found} than the index says")
        target.truncate(size)

    _retried(attempt, address, patience)


def _retried(attempt: Callable[[], None], address: str, patience: Patience) -> None:
    chance = (
        random.SystemRandom()
    )  # so that many nodes do not come back at once; no draw of the run
    for number in range(1, patience.attempts + 1):
        try:
            return attempt()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{address}: {_said(error)}") from error
        except Exception as error:  # what fails differs from one protocol's library to the next
            if number == patience.attempts:
                raise UserError(
                    f"{address}: given up after {number} attempts: {_said(error)}"
                ) from error
            time.sleep(patience.wait * 2 ** (number - 1) * (0.5 + chance.random()))


def _said(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


@contextmanager
def _opened(address: str, start: int, patience: Patience) -> Iterator[tuple[Any, int]]:
    """(file, the byte at which it begins: `start`, or 0 where the server cannot begin there)."""
    protocol = address.partition("://")[0]
    try:
        filesystem = _filesystem(protocol, patience.stall)
    except ImportError as error:
        raise UserError(
            f"{address}: needs the package '{PACKAGES[protocol]}': pip install 'dist-train[{EXTRAS[protocol]}]'"
        ) from error
    if protocol in ("http", "https"):
        # block_size 0 means one stream; a size, whichever, saves fsspec a request that asks for it
        stream = {"block_size": 0, "size": 1}
        ranged = {"headers": {"Range": f"bytes={start}-"}} if start else {}
        with filesystem.open(address, "rb", **stream, **ranged) as file:
            yield file, start if file.r.status == 206 else 0
    else:
        with filesystem.open(address, "rb", block_size=8 * BLOCK) as file:
            file.seek(start)
            yield file, start


def _filesystem(protocol: str, stall: float) -> Any:
    import fsspec

    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=stall)
        return fsspec.filesystem(protocol, client_kwargs={"timeout": limits, "trust_env": True})
    if protocol == "s3":
        bounds = {"connect_timeout": CONNECT, "read_timeout": stall, "retries": {"max_attempts": 1}}
        return fsspec.filesystem(protocol, config_kwargs=bounds)
    # it logs a traceback for each try of its own; ours is a line
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem(protocol, timeout=stall)
