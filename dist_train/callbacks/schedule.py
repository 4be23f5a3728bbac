"""Any scalar on a schedule of the global step: beta, teacher forcing, noise, momentum, weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train import components
from dist_train.callbacks.scheduled import Scheduled
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

OF_THE_OPTIMIZER = ("momentum", "weight_decay", "l1")


class Schedule(Scheduled):
    """scalar(step) = `value` times the schedule at that step, for objectives to read as `scalars[NAME]`.

    `momentum` (Adam's first beta), `weight_decay` and `l1` are the optimiser's own: the schedule multiplies what the
    recipe gives it, in each of its groups. The values are in the rows of `metrics.jsonl`.

    Args:
        scalar: its name. value: what the schedule multiplies; not for the optimiser's own.
        schedule, warmup: see `Scheduled`. A rise from 0 is `schedule: constant` with a warm-up.
        players: whose optimiser; all players by default.
    """

    def __init__(
        self,
        scalar: str,
        schedule: str | dict[str, Any] = "linear",
        value: float | None = None,
        warmup: str = "0 steps",
        players: list[str] | None = None,
    ) -> None:
        super().__init__(schedule, warmup, f"schedule of {scalar}")
        if scalar == "learning_rate":
            raise UserError("scalar: learning_rate has its own callback, learning_rate_decay")
        own = scalar in OF_THE_OPTIMIZER
        if own != (value is None):
            expected = (
                "none, it is the optimiser's own"
                if own
                else "a number for the schedule to multiply"
            )
            raise UserError(f"value: got {value}, expected {expected}")
        if players is not None and not own:
            raise UserError(f"players: {scalar} is no optimiser's, every objective sees it")
        self.scalar, self.value, self.players = scalar, value, players

    def configure(self, recipe: Recipe) -> None:
        super().configure(recipe)
        if self.scalar not in ("momentum", "weight_decay"):
            return
        for player in self.players or recipe.players:
            spec = recipe.optimizers[player]
            takes = components.arguments(components.resolve("optimizer", spec["name"]))
            if self.scalar not in takes and not (self.scalar == "momentum" and "betas" in takes):
                raise UserError(f"scalar: optimizer '{spec['name']}' has no {self.scalar}")

    def _apply(self, run: Trainer, factor: float) -> None:
        if self.value is not None:
            run.scalars[self.scalar] = self.value * factor
            return
        for player in self.players or run.engines:
            now = run.engines[player].scale_setting(self.scalar, factor)
            run.scalars[run.named(player, self.scalar)] = now
