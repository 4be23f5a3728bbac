"""A process that fetches shards before they are needed."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.sharedctypes import RawValue
from typing import Any

from dist_train.data_shards.index import Shard
from dist_train.data_shards.storage import Bucket
from dist_train.errors import UserError

Need = tuple[Bucket, Shard]
PARALLEL = 8
"""Files that are fetched at once."""


class Prefetch:
    """Fetches what each of `places` needs, in that order, until the block ends; `reached(place)` says how far it is.

    It runs ahead by at most half the cache, so that what is in use stays there. A failure here is none of the run:
    whoever needs the shard tries again, and says what is wrong.
    """

    def __init__(self, needs: Callable[[int], list[Need]], places: range) -> None:
        self._place = RawValue(ctypes.c_longlong, places[0] if places else 0)
        self._process = multiprocessing.get_context("fork").Process(
            target=_fetch, args=(needs, places, self._place, os.getpid()), daemon=True
        )

    def __enter__(self) -> Prefetch:
        self._process.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.join()

    def reached(self, place: int) -> None:
        """Say that `place` is in use now."""
        self._place.value = place


def _fetch(needs: Callable[[int], list[Need]], places: range, now: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    free = threading.Semaphore(PARALLEL)
    under_way: list[
        tuple[int, int]
    ] = []  # (place, bytes) of what was asked for and is not in use yet
    with ThreadPoolExecutor(PARALLEL) as pool:
        for place, bucket, shard in first_needs(needs, places):
            while True:
                under_way = [ahead for ahead in under_way if ahead[0] > now.value]
                full = sum(size for _, size in under_way) + shard.bytes > bucket.cache.size // 2
                if not (full and under_way) and free.acquire(timeout=0.1):
                    break
                if os.getppid() != parent:
                    os._exit(0)
                time.sleep(0.02)
            under_way.append((place, shard.bytes))
            pool.submit(_fetch_one, bucket, shard, free)


def _fetch_one(bucket: Bucket, shard: Shard, free: threading.Semaphore) -> None:
    try:
        bucket.tar(shard)
    except UserError as error:
        logging.getLogger("dist_train").info("ahead of its use: %s", error)
    finally:
        free.release()


def first_needs(
    needs: Callable[[int], list[Need]], places: range
) -> Iterator[tuple[int, Bucket, Shard]]:
    """(place, bucket, shard) whenever a place needs a shard that a cache of that size would not hold any more."""
    held: dict[str, int] = {}
    for place in places:
        for bucket, shard in needs(place):
            if shard.sha256 not in held:
                yield place, bucket, shard
            held[shard.sha256] = held.pop(shard.sha256, shard.bytes)  # the last one used
            while sum(held.values()) > bucket.cache.size:
                del held[next(iter(held))]
