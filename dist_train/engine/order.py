"""In which order a rank takes part in collectives. They are paired by that alone: ranks that differ in it would add up,
or compute with, each other's other tensors."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from dist_train.errors import UserError
from dist_train.world import World


class Order:
    """What a rank has gathered or summed, in order, as one number that the ranks compare.

    Args:
        otherwise: what is wrong where they differ, and what to do.
    """

    def __init__(self, otherwise: str) -> None:
        self._otherwise = otherwise
        self.clear()

    def clear(self) -> None:
        self._digest = 0

    def note(self, name: str) -> None:
        self._digest = zlib.crc32(name.encode(), self._digest)

    def check(self, world: World, beside: Tensor | None = None) -> Tensor:
        """The sum over all ranks of `beside` (0-d; nothing where a rank has none), in fp64; it travels with the digest.

        Raises: UserError on at least one rank where they are not all the same. A GPU raises it when it comes to it:
            nobody waits for the device.
        """
        both = torch.zeros(2, dtype=torch.float64, device=world.device)
        if beside is not None:
            both[0] = beside
        both[1] = self._digest  # 32 bits, whose sum over 2 million ranks is exact
        world.sum_(both)
        agreed = both[1] == self._digest * world.size
        if world.device != "cpu":
            torch._assert_async(agreed, self._otherwise)
        elif not agreed:
            raise UserError(self._otherwise)
        return both[0]
