"""Law 1: which sample stands at which place of training is a function of (seed, epoch, place), stored nowhere."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np

ROUNDS = 6
U64 = np.uint64
SHIFT_1, SHIFT_2, SHIFT_3 = U64(30), U64(27), U64(32)
FACTOR_1, FACTOR_2 = U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)


class Order:
    """The endless order of `size` samples: epoch after epoch, each a keyed permutation of [0, size).

    The permutation is an alternating Feistel network on pairs (left, right) of Z_a x Z_b, where a * b is the smallest
    such product with a = ceil(sqrt(size)). Adding a function of one half to the other can always be undone, so it is a
    bijection of [0, a * b); a value that falls outside [0, size) is sent through again until it falls inside ("cycle
    walking"), which keeps it one on [0, size). Memory is O(1), and any place can be asked for at once.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, not {size}")
        self.size = size
        self.seed = seed
        self._a = U64(math.isqrt(size - 1) + 1)
        self._b = U64(-(-size // int(self._a)))

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, ids), int64 arrays, of the places [start, stop) of the endless order."""
        epochs, places = np.divmod(np.arange(start, stop, dtype=np.int64), self.size)
        if stop <= start:
            return epochs, places
        first = int(epochs[0])
        keys = np.stack([self._keys(epoch) for epoch in range(first, int(epochs[-1]) + 1)], axis=1)
        return epochs, self._permute(places.astype(U64), keys, epochs - first).astype(np.int64)

    def _keys(self, epoch: int) -> np.ndarray:
        text = struct.pack("<qq", self.seed, epoch)
        digest = hashlib.blake2b(text, digest_size=8 * ROUNDS, person=b"dist-train order").digest()
        return np.frombuffer(digest, dtype="<u8").astype(U64)

    def _permute(self, places: np.ndarray, keys: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        """Map `places` (n,) under the round `keys` (ROUNDS, epochs), of which place i uses column `epoch[i]`."""
        left, right = np.divmod(places, self._b)
        for number, key in enumerate(keys[:, epoch] if keys.shape[1] > 1 else keys):
            if number % 2 == 0:
                left = (left + _mix(right + key)) % self._a
            else:
                right = (right + _mix(left + key)) % self._b
        ids = left * self._b + right
        outside = np.flatnonzero(ids >= self.size)
        if len(outside):
            ids[outside] = self._permute(ids[outside], keys, epoch[outside])
        return ids


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words (the finaliser of splitmix64), down to 32 bits so that a sum cannot overflow."""
    x = (x ^ (x >> SHIFT_1)) * FACTOR_1
    x = (x ^ (x >> SHIFT_2)) * FACTOR_2
    return x >> SHIFT_3
