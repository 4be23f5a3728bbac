"""Exponential moving average of the weights, sharded as the engine's weights are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from dist_train.callbacks import Callback
from dist_train.callbacks.average import Average, Averages
from dist_train.engine import Slice
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.objectives import Turn
    from dist_train.trainer import Trainer


class ExponentialMovingAverage(Callback):
    """average <- d * average + (1 - d) * weights after each of a player's turns (Polyak and Juditsky 1992), with
    d = min(decay, (1 + t) / (10 + t)) at its t-th turn, so that a short run is not held back by its first weights.

    Running statistics of normalisation are averaged alike. Evaluate with it by `evaluate: {weights: ema}`.

    Args:
        decay: in [0, 1). players: whose weights; all players by default.
    """

    priority = 20

    def __init__(self, decay: float = 0.999, players: list[str] | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema: decay must be in [0, 1), got {decay!r}")
        self.decay, self.players = decay, players
        self.turns: dict[str, int] = {}
        self.averages = Averages()

    def run_begins(self, run: Trainer) -> None:
        for player in self.players or run.engines:
            self.turns.setdefault(player, 0)
            self.averages[player] = Average(run.engines[player])

    def turn_ends(self, run: Trainer, turn: Turn) -> None:
        if turn.player not in self.averages:
            return
        done = self.turns[turn.player]
        self.turns[turn.player] = done + 1
        self.averages[turn.player].move(1 - min(self.decay, (1 + done) / (10 + done)))

    def weights(self, run: Trainer) -> dict[str, dict[str, Tensor]]:
        return self.averages.weights()

    def slices(self) -> Iterator[tuple[str, Slice]]:
        return self.averages.slices()

    def state_dict(self) -> dict[str, int]:
        return dict(self.turns)

    def load_state_dict(self, state: dict[str, int]) -> None:  # type: ignore[override]
        self.turns = dict(state)
