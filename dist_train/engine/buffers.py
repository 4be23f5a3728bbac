"""Buffers that a forward changes: running statistics, spectral-norm vectors (law 11, docs/decisions/0004)."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.world import World


class BufferKeeper:
    """Law 11: buffers that a forward changes take one update a turn.

    Each micro-batch starts from the buffers as they were when the turn began; what they become is the mean over all
    micro-batches of all ranks. For running statistics, which are linear in the batch's own, that is the update from
    the mean statistics; spectral-norm vectors, which depend on the weights alone, advance once.
    """

    def __init__(self, buffers: list[Tensor], world: World) -> None:
        self.world = world
        self.floats = [b for b in buffers if b.is_floating_point()]
        self.integers = [b for b in buffers if not b.is_floating_point()]
        self.before = [torch.empty_like(b) for b in self.floats]
        self._integers_before = [torch.empty_like(b) for b in self.integers]
        self.change = [torch.zeros_like(b) for b in self.floats]
        self.micro_batches = 0

    @torch.no_grad()
    def begin(self) -> None:
        self.micro_batches = 0
        if self.floats:
            torch._foreach_copy_(self.before, self.floats)
            torch._foreach_zero_(self.change)
        if self.integers:
            torch._foreach_copy_(self._integers_before, self.integers)

    @torch.no_grad()
    def after_micro_batch(self, last: bool) -> None:
        self.micro_batches += 1
        if self.floats:
            torch._foreach_add_(self.change, torch._foreach_sub(self.floats, self.before))
            torch._foreach_copy_(self.floats, self.before)
        if self.integers and not last:
            torch._foreach_copy_(self.integers, self._integers_before)

    @torch.no_grad()
    def undo(self) -> None:
        """End a turn that changes nothing."""
        if self.floats:
            torch._foreach_copy_(self.floats, self.before)
        if self.integers:
            torch._foreach_copy_(self.integers, self._integers_before)

    @torch.no_grad()
    def end(self) -> None:
        if not self.floats:
            return
        if self.world.size == 1:
            torch._foreach_div_(self.change, self.micro_batches)
            torch._foreach_add_(self.floats, self.change)
            return
        flat = torch.cat([c.flatten() for c in self.change])
        self.world.sum_(flat).div_(self.micro_batches * self.world.size)
        mean = [
            part.view_as(b)
            for part, b in zip(
                flat.split([b.numel() for b in self.floats]), self.floats, strict=True
            )
        ]
        torch._foreach_add_(self.floats, mean)
