"""The learning rate on a schedule of the global step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train import components
from dist_train.callbacks.scheduled import Scheduled
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
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
        self.rates: dict[str, float] = {}

    def configure(self, recipe: Recipe) -> None:
        super().configure(recipe)
        for player in self.players or recipe.players:
            spec = recipe.optimizers[player]
            takes = components.arguments(components.resolve("optimizer", spec["name"]))
            if "learning_rate" not in takes:
                raise UserError(f"optimizer '{spec['name']}' has no learning_rate")
            self.rates[player] = spec.get("learning_rate", takes["learning_rate"].default)

    def _apply(self, run: Trainer, factor: float) -> None:
        for player, rate in self.rates.items():
            run.engines[player].set_learning_rate(rate * factor)
