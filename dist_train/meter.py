"""Means over a log window, kept on the device and read once a window (no host sync per step)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_train.world import World


class Meter:
    """Weighted means of named values over all ranks since the last `flush`."""

    def __init__(self) -> None:
        self._added: dict[str, list[tuple[float | Tensor, float | Tensor]]] = defaultdict(list)
        self._sums: dict[str, list[float]] = {}
        self._marked: dict[str, int] = {}

    def add(self, name: str, value: float | Tensor, count: float | Tensor = 1.0) -> None:
        """Take a value (0-d tensor or number) that stands for `count` things."""
        self._added[name].append((value, count))

    def mark(self) -> None:
        """Remember what was added so far, to which `back_to_mark` may go back before the next `flush`."""
        self._marked = {name: len(pairs) for name, pairs in self._added.items()}

    def back_to_mark(self) -> None:
        """Forget what was added since `mark`."""
        for name, pairs in self._added.items():
            del pairs[self._marked.get(name, 0) :]

    def totals(self, world: World) -> dict[str, list[float]]:
        """[weighted sum, count] by name over all ranks since the last `flush` (collective)."""
        self._fold()
        totals: dict[str, list[float]] = {}
        for sums in world.gather(self._sums):
            for name, (value, count) in sums.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        return totals

    def flush(self, world: World) -> dict[str, float]:
        """The means by name, and start anew (collective)."""
        totals = self.totals(world)
        self._sums = {}
        return {
            name: value / count if count else math.nan for name, (value, count) in totals.items()
        }

    def restore(self, totals: Mapping[str, Any], world: World) -> None:
        """Go on from the totals that a checkpoint holds; rank 0 carries them."""
        self._added.clear()
        self._sums = {name: list(pair) for name, pair in totals.items()} if world.is_main else {}

    def _fold(self) -> None:
        numbers = [n for pairs in self._added.values() for pair in pairs for n in pair]
        on_device = [n for n in numbers if isinstance(n, Tensor)]
        read = iter(torch.stack(on_device).double().tolist() if on_device else [])
        for name, pairs in self._added.items():
            if not pairs:
                continue
            total = self._sums.setdefault(name, [0.0, 0.0])
            for value, count in pairs:
                value = next(read) if isinstance(value, Tensor) else float(value)
                count = next(read) if isinstance(count, Tensor) else float(count)
                total[0] += value * count
                total[1] += count
        self._added.clear()
