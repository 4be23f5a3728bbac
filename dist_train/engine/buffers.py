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
        self.live = self.floats + self.integers
        self.micro_batches = 0

    def begin(self) -> None:
        if not self.live:
            return
        self.before = [b.detach().clone() for b in self.live]
        self.change = [torch.zeros_like(b) for b in self.floats]
        self.micro_batches = 0

    def after_micro_batch(self, last: bool) -> None:
        if self.live:
            self._after_micro_batch(last)

    @torch.no_grad()
    def _after_micro_batch(self, last: bool) -> None:
        self.micro_batches += 1
        start = self.before[: len(self.floats)]
        if self.floats:
            torch._foreach_add_(self.change, torch._foreach_sub(self.floats, start))
        for buffer, before in zip(self.live, self.before, strict=True):
            if not last or buffer.is_floating_point():
                buffer.copy_(before)

    @torch.no_grad()
    def undo(self) -> None:
        """End a turn that changes nothing."""
        for buffer, before in zip(self.live, self.before if self.live else [], strict=True):
            buffer.copy_(before)

    def end(self) -> None:
        if self.floats:
            self._end()

    @torch.no_grad()
    def _end(self) -> None:
        flat = torch.cat([c.flatten() for c in self.change])
        self.world.sum_(flat).div_(self.micro_batches * self.world.size)
        mean = [
            part.view_as(b)
            for part, b in zip(
                flat.split([b.numel() for b in self.floats]), self.floats, strict=True
            )
        ]
        torch._foreach_add_(self.floats, mean)
