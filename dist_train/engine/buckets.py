"""Gradients summed over the ranks while backward still runs, in buckets that never change (docs/decisions/0001)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.world import World

BUCKET_BYTES = 25 * 1024 * 1024
"""What a bucket of a large network holds."""
SHARES, LEAST_BYTES = 8, 1024 * 1024
"""A small network has so many buckets, so that sums hide behind its backward too, but none of fewer bytes than that."""


class Buckets:
    """Flat gradient buffers, filled in the reverse order of the parameters, so that the sums over the ranks start while
    backward still runs. Which gradient lies in which bucket never changes: torch's DDP regroups its buckets after the
    first step, and with three ranks or more that alone makes a resumed run differ."""

    def __init__(self, parameters: list[nn.Parameter], world: World) -> None:
        self.world = world
        self.launch_when_ready = False
        self.flat: list[Tensor] = []
        self.members: list[list[nn.Parameter]] = []
        share = sum(p.numel() * p.element_size() for p in parameters) // SHARES
        full = min(BUCKET_BYTES, max(LEAST_BYTES, share))
        for parameter in reversed(parameters):
            bytes_so_far = (
                sum(p.numel() * p.element_size() for p in self.members[-1]) if self.members else 0
            )
            if (
                not self.members
                or bytes_so_far >= full
                or self.members[-1][0].dtype != parameter.dtype
                or self.members[-1][0].device != parameter.device
            ):
                self.members.append([])
            self.members[-1].append(parameter)
        for index, members in enumerate(self.members):
            flat = torch.zeros(
                sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device
            )
            offset = 0
            for parameter in members:
                parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
                parameter.register_post_accumulate_grad_hook(
                    lambda _, index=index: self._ready(index)
                )
            self.flat.append(flat)
        self.clear()

    def clear(self) -> None:
        """Start a turn: every gradient is zero, nothing is under way."""
        for flat in self.flat:
            flat.zero_()
        self.launch_when_ready = False
        self.waiting = [len(members) for members in self.members]
        self.work: list[Any] = []

    def _ready(self, index: int) -> None:
        if not self.launch_when_ready:
            return
        self.waiting[index] -= 1
        # every rank must start the buckets in one order, whichever gradient happens to be ready first
        while len(self.work) < len(self.flat) and self.waiting[len(self.work)] == 0:
            self._launch()

    def _launch(self) -> None:
        self.work.append(dist.all_reduce(self.flat[len(self.work)], async_op=True))

    def finish(self) -> None:
        """Start what is left (networks that a turn did not use) and wait for all sums."""
        while len(self.work) < len(self.flat):
            self._launch()
        for work in self.work:
            work.wait()
