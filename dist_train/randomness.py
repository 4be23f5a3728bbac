"""Law 2: every random draw of the model is a function of (seed, step, turn, micro-batch).

The default generators are reseeded before each forward, so there is nothing to save, nothing to restore, and nothing
that depends on how many ranks there are.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EVALUATION = -1
"""The turn index of draws made outside training: evaluation and samples."""


def key(*numbers: int) -> int:
    """A 63-bit seed from integers; different tuples give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(*numbers: int) -> None:
    """Seed the default generator of the CPU, and of this rank's GPU when it is in use."""
    seed = key(*numbers)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


@contextmanager
def at(seed: int, step: int, turn: int, micro: int) -> Iterator[None]:
    """Within this block every draw comes from the generator of (seed, step, turn index, micro-batch index)."""
    reseed(seed, step, turn, micro)
    yield
