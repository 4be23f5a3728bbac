"""Keyed permutations of [0, n), computed place by place: any n, O(1) memory, the same on every machine."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np

ROUNDS = 6
U64 = np.uint64
SHIFT_1, SHIFT_2, SHIFT_3 = U64(30), U64(27), U64(32)
FACTOR_1, FACTOR_2 = U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)
APART = U64(0x9E3779B97F4A7C15)


def round_keys(seed: int, epoch: int, purpose: str = "") -> np.ndarray:
    """The keys (ROUNDS,) uint64 of a permutation."""
    text = struct.pack("<qq", seed, epoch) + purpose.encode()
    digest = hashlib.blake2b(text, digest_size=8 * ROUNDS, person=b"dist-train order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(U64)


def permute(places: np.ndarray, size: Any, keys: np.ndarray, number: Any = 0) -> np.ndarray:
    """Where the permutation `number` of [0, size) under `keys` sends `places` (n,); all int64.

    `size` and `number` are one whole number each, or one a place (n,): many permutations in one call.

    It is an alternating Feistel network on pairs (left, right) of Z_a x Z_b, with a = ceil(sqrt(size)) and the smallest
    b so that a * b >= size. Adding a function of one half to the other can always be undone, so it is a bijection of
    [0, a * b); a value that falls outside [0, size) is sent through again until it falls inside ("cycle walking"),
    which keeps it one on [0, size).
    """
    sizes, numbers = np.asarray(size).astype(U64), np.asarray(number).astype(U64) * APART
    a = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(U64)
    b = (sizes + a - U64(1)) // a
    return _walk(places.astype(U64), sizes, a, b, keys, numbers).astype(np.int64)


def scramble(numbers: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words: the finaliser of splitmix64."""
    numbers = (numbers ^ (numbers >> SHIFT_1)) * FACTOR_1
    numbers = (numbers ^ (numbers >> SHIFT_2)) * FACTOR_2
    return numbers ^ (numbers >> U64(31))


def _walk(places: Any, sizes: Any, a: Any, b: Any, keys: Any, numbers: Any) -> np.ndarray:
    left, right = np.divmod(places, b)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right + (key + numbers))) % a
        else:
            right = (right + _mix(left + (key + numbers))) % b
    ids = left * b + right
    outside = np.flatnonzero(ids >= sizes)
    if len(outside):
        sizes, a, b, numbers = (x[outside] if x.ndim else x for x in (sizes, a, b, numbers))
        ids[outside] = _walk(ids[outside], sizes, a, b, keys, numbers)
    return ids


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words, down to 32 bits so that a sum cannot overflow."""
    x = (x ^ (x >> SHIFT_1)) * FACTOR_1
    x = (x ^ (x >> SHIFT_2)) * FACTOR_2
    return x >> SHIFT_3
