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
    first step, and with three ranks or more that alone makes a resumed run differ.

    The first gradients of a turn are copied in once all of a bucket are there, later ones are added in place.
    """

    def __init__(self, parameters: list[nn.Parameter], world: World) -> None:
        self.world = world
        self.flat: list[Tensor] = []
        self.members: list[list[nn.Parameter]] = []
        self._places: list[list[Tensor]] = []  # of each member's gradient in its bucket
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
            sizes = [p.numel() for p in members]
            flat = torch.zeros(sum(sizes), dtype=members[0].dtype, device=members[0].device)
            parts = zip(flat.split(sizes), members, strict=True)
            self._places.append([part.view_as(parameter) for part, parameter in parts])
            self.flat.append(flat)
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, index=index: self._ready(index)
                )
        self.clear()

    def clear(self) -> None:
        """Start a turn: there is no gradient, nothing is under way."""
        for members in self.members:
            for parameter in members:
                parameter.grad = None
        self.work: list[Any] = []
        self.expect(last=False)

    def expect(self, last: bool) -> None:
        """Start a backward. The sums over the ranks start in the `last` one of a turn."""
        self._last = last
        self._waiting = [len(members) for members in self.members]

    def _ready(self, index: int) -> None:
        self._waiting[index] -= 1
        if self._waiting[index] == 0:
            self._take(index)
        # every rank must start the buckets in one order, whichever gradient happens to be ready first
        while self._last and len(self.work) < len(self.flat) and not self._waiting[len(self.work)]:
            self._launch()

    @torch.no_grad()
    def _take(self, index: int) -> None:
        """Put the gradients into their bucket that lie elsewhere; what has none yet is zero."""
        members, places = self.members[index], self._places[index]
        outside = [i for i, p in enumerate(members) if p.grad is not places[i]]
        found = [i for i in outside if members[i].grad is not None]
        if found:
            torch._foreach_copy_([places[i] for i in found], [members[i].grad for i in found])  # type: ignore[misc]
        if len(found) < len(outside):
            torch._foreach_zero_([places[i] for i in outside if members[i].grad is None])
        for i in outside:
            members[i].grad = places[i]

    def take(self) -> None:
        """Put all gradients into their buckets."""
        for index in range(len(self.flat)):
            self._take(index)

    def _launch(self) -> None:
        self.work.append(dist.all_reduce(self.flat[len(self.work)], async_op=True))

    def finish(self) -> None:
        """Start what is left (networks that a turn did not use) and wait for all sums."""
        while len(self.work) < len(self.flat):
            self._take(len(self.work))
            self._launch()
        for work in self.work:
            work.wait()
