"""The learning rate on a schedule of the global step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train.callbacks.scheduled import Scheduled

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


class LearningRateDecay(Scheduled):
    """rate(step) = the optimiser's `learning_rate` times the schedule at that step.

    Args:
        schedule, warmup: see `Scheduled`.
        players: whose rate; all players by default.
    """

    def __init__(
        self,
        schedule: str | dict[str, Any] = "cosine",
        warmup: str = "0 steps",
        players: list[str] | None = None,
    ) -> None:
        super().__init__(schedule, warmup, "learning_rate_decay.schedule")
        self.players = players

    def run_begins(self, run: Trainer) -> None:
        super().run_begins(run)
        optimizers = run.recipe.optimizers
        self.rates = {p: optimizers[p]["learning_rate"] for p in self.players or run.engines}

    def _apply(self, run: Trainer, factor: float) -> None:
        for player, rate in self.rates.items():
            run.engines[player].set_learning_rate(rate * factor)
