"""Law 1: which sample stands at which place of training is a function of (seed, epoch, place), stored nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dist_train.data_shards.permutation import U64, permute, round_keys, scramble
from dist_train.errors import UserError, nearest

SHUFFLES = ("global", "window", "none")
MOST_RANKS = 64
"""An automatic number of streams serves every number of ranks up to this that divides the batch."""


class Ordering(Protocol):
    """An endless sequence of samples. An epoch of it has `size` places."""

    size: int

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, ids), int64 arrays, of the places [start, stop)."""


class Order:
    """The endless order of `size` samples: epoch after epoch, each a keyed permutation of [0, size).

    Args:
        shuffle: "global" permutes all samples. "window" takes the shards in a keyed order and permutes the samples of
            `window` shards at a time, so that no more shards than that are needed at once (two windows where they
            meet). "none" is the order of the files.
        shards: how many samples each shard has; only "window" asks.
        batch, streams: of each batch of B places, stream s of C has the rows [s * B / C, (s + 1) * B / C), and these
            come from the s-th part of the samples alone. So a rank whose rows are those of whole streams needs only
            their parts, and that changes nothing in the order. The streams share `window` (at least one shard each).

    An epoch seldom is a whole number of batches, so a stream has a few samples more in one epoch than in the next, and
    the bounds between the parts move by at most `batch` samples.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        shuffle: str = "global",
        shards: Sequence[int] | np.ndarray = (),
        window: int = 16,
        batch: int = 1,
        streams: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, not {size}")
        if shuffle not in SHUFFLES:
            raise UserError(
                f"data.shuffle '{shuffle}'{nearest(shuffle, SHUFFLES)} (use {', '.join(SHUFFLES)})"
            )
        if streams < 1 or batch % streams:
            raise UserError(
                f"data.streams {streams}: must divide the global batch {batch}, "
                f"like {default_streams(batch)}"
            )
        self.size, self.seed = size, seed
        self.shuffle = shuffle
        self.batch, self.streams = batch, streams
        self.window = max(1, window // streams)
        self._starts = np.cumsum(shards, dtype=np.int64) - shards
        self._tables: dict[int, _Windows] = {}

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, ids), int64 arrays, of the places [start, stop) of the endless order."""
        epochs = np.arange(start, stop, dtype=np.int64) // self.size
        parts = [
            self._in_epoch(
                epoch, np.arange(max(start, epoch * self.size), min(stop, (epoch + 1) * self.size))
            )
            for epoch in range(start // self.size, -(-stop // self.size))
        ]
        return epochs, np.concatenate(parts) if parts else epochs

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The ids at `places` (n,), all of one epoch."""
        stream, low, size, inner = self._in_streams(epoch, places)
        if self.shuffle == "none":
            return low + inner
        if self.shuffle == "global":
            return low + permute(inner, size, round_keys(self.seed, epoch), stream)
        if epoch not in self._tables:
            bounds = self._part(epoch, np.arange(self.streams + 1))
            kept = {e: t for e, t in self._tables.items() if abs(e - epoch) <= 1}
            self._tables = kept | {epoch: _Windows(self, epoch, bounds)}
        return self._tables[epoch].ids(low + inner)

    def _in_streams(self, epoch: int, places: np.ndarray) -> tuple[Any, Any, Any, np.ndarray]:
        """Of each place (its stream, the first id of that one's part, the size of the part, the place in it)."""
        begin = epoch * self.size
        if self.streams == 1:
            return 0, 0, self.size, places - begin
        stream = places % self.batch // (self.batch // self.streams)
        low, high = self._part(epoch, stream), self._part(epoch, stream + 1)
        inner = self._before(places, stream + 1) - self._before(places, stream)
        inner -= self._before(begin, stream + 1) - self._before(begin, stream)
        return stream, low, high - low, inner

    def _before(self, places: np.ndarray | int, streams: np.ndarray | int) -> np.ndarray:
        """How many places before `places` belong to streams before `streams`."""
        rows = np.asarray(streams) * (self.batch // self.streams)
        return places // self.batch * rows + np.minimum(places % self.batch, rows)

    def _part(self, epoch: int, streams: np.ndarray | int) -> np.ndarray:
        """The first ids of the parts of `streams` in this epoch."""
        begin, end = epoch * self.size, (epoch + 1) * self.size
        return self._before(end, streams) - self._before(begin, streams)


class _Windows:
    """One epoch of an order by windows: shards in keyed order, windows of them, each permuted within.

    A shard that the bound between two streams cuts is a piece of each. Places here are those of the streams laid end
    to end. Memory is O(shards), a lookup O(log shards).
    """

    def __init__(self, order: Order, epoch: int, bounds: np.ndarray) -> None:
        starts = np.sort(np.concatenate([order._starts, bounds[:-1]]), kind="stable")
        firsts = np.searchsorted(starts, bounds[:-1])  # of each stream, its first piece
        counts = np.diff(firsts, append=len(starts))
        stream = np.repeat(np.arange(order.streams), counts)
        number = np.arange(len(starts))
        arranged = _arranged(number, stream, round_keys(order.seed, epoch, "shards")[0])
        lengths = np.diff(starts, append=order.size)[arranged]
        self.pieces = np.cumsum(lengths) - lengths  # the first place of each
        self.first_ids = starts[arranged]
        self.windows = self.pieces[(number - firsts[stream]) % order.window == 0]
        self.sizes = np.diff(self.windows, append=order.size)
        self.keys = round_keys(order.seed, epoch)

    def ids(self, places: np.ndarray) -> np.ndarray:
        """The ids at `places` (n,)."""
        window = np.searchsorted(self.windows, places, "right") - 1
        low = self.windows[window]
        places = low + permute(places - low, self.sizes[window], self.keys, window)
        piece = np.searchsorted(self.pieces, places, "right") - 1
        return self.first_ids[piece] + places - self.pieces[piece]


def _arranged(numbers: np.ndarray, streams: np.ndarray, key: np.uint64) -> np.ndarray:
    """The pieces `numbers`, stream by stream, within each in the order of a keyed hash.

    One sort of 64-bit words, which is many times as fast as a sort by several keys: the stream, then the hash, and in
    its lowest bits the number itself.
    """
    low = U64(len(numbers).bit_length())
    high = U64(int(streams[-1]).bit_length())
    own = numbers.astype(U64)
    words = scramble(own + key) >> (high + low) << low | own
    if high:
        words |= streams.astype(U64) << (U64(64) - high)
    words.sort()
    return (words & ((U64(1) << low) - U64(1))).astype(np.int64)


class Bootstrap:
    """`size` draws with replacement from an order's samples, in its order: the same draws in each epoch.

    What one member of an ensemble sees ("bagging"); members differ by `seed`. About 37 % of the samples are not drawn.
    """

    def __init__(self, order: Ordering, seed: int) -> None:
        self.order, self.size = order, order.size
        self._key = round_keys(seed, 0, "bootstrap")[0]

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, ids), int64 arrays, of the places [start, stop)."""
        epochs, drawn = self.order.at(start, stop)
        return epochs, self.draws(drawn)

    def draws(self, numbers: np.ndarray) -> np.ndarray:
        """The samples of the draws `numbers` (n,) of [0, size)."""
        words = scramble(scramble(numbers.astype(U64)) + self._key)
        return (words % U64(self.size)).astype(np.int64)


def default_streams(batch: int) -> int:
    """The fewest streams that let any number of ranks up to MOST_RANKS that divides `batch` take whole ones."""
    return math.lcm(*(ranks for ranks in range(1, MOST_RANKS + 1) if batch % ranks == 0))
