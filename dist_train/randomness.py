"""Law 2: every random draw of the model is a function of (seed, step, turn, micro-batch).

The default generators are reseeded before each forward, so there is nothing to save, nothing to restore, and nothing
that depends on how many ranks there are.
"""

from __future__ import annotations

import hashlib
import struct

import torch

EVALUATION = -1
"""The turn index of draws made outside training: evaluation and samples."""
STATISTICS = -2
"""That of draws made while running statistics are taken anew."""


def key(*numbers: int) -> int:
    """A 63-bit seed from integers; different tuples give unrelated seeds."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(*numbers: int) -> None:
    """From here on every draw is a function of these numbers alone, on the CPU and on this rank's GPU when it is in
    use: of (seed, step, turn index, micro-batch index) in a forward."""
    seed = key(*numbers)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
