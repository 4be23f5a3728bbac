"""Averages of players' weights, sharded as the engine's weights are: what `ema` and `swa` keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dist_train.engine import Engine, Slice


class Average:
    """A copy of what a rank holds of one player, weights and floating-point buffers, that moves towards it.

    Attributes:
        slices: of the average, named and cut as the engine's own.
    """

    def __init__(self, engine: Engine) -> None:
        live = _live(engine)
        self._engine = engine
        self.slices = [replace(part, tensor=part.tensor.clone()) for part in live]
        self._average = [part.tensor for part in self.slices]
        self._live = [part.tensor for part in live]

    def move(self, share: float) -> None:
        """average <- average + share * (weights - average); with a share of 1 it is the weights."""
        if self._live:  # of a player with fewer rows than ranks a rank may hold nothing
            torch._foreach_lerp_(self._average, self._live, share)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The averaged buffers by name, in their own shapes: views that can be written to."""
        names = self._engine.buffers
        return {p.name: p.tensor.view(p.shape) for p in self.slices if p.name in names}

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers by name, whole (collective); what is not averaged, as it is."""
        names = {part.name for part in self._engine.weights}
        averaged = self._engine.full(part for part in self.slices if part.name in names)
        return {**self._engine.full_weights(), **averaged, **self.buffers}


class Averages(dict[str, Average]):
    """By player."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Of each, weights and buffers by name, whole (collective)."""
        return {player: average.weights() for player, average in self.items()}

    def slices(self) -> Iterator[tuple[str, Slice]]:
        """Of all, as a callback gives them to checkpoints."""
        for average in self.values():
            for part in average.slices:
                yield part.name, part


def _live(engine: Engine) -> list[Slice]:
    floats = {name: b for name, b in engine.buffers.items() if b.is_floating_point()}
    return [*engine.weights, *(Slice.whole(name, b) for name, b in floats.items())]
