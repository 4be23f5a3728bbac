"""The learning rate on a schedule of the global step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train import schedules
from dist_train.callbacks import Callback
from dist_train.duration import Duration

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class LearningRateDecay(Callback):
    """rate(step) = the optimiser's `learning_rate` times the schedule at that step.

    Args:
        schedule: a name (`cosine`), or `{name: step, every: 5 epochs, factor: 0.1}`; durations inside it may be in any
            unit.
        warmup: how long the rate rises linearly to its full value first.
        players: whose rate; all players by default.
    """

    priority = 10

    def __init__(
        self,
        schedule: str | dict[str, Any] = "cosine",
        warmup: str = "0 steps",
        players: list[str] | None = None,
    ) -> None:
        self.spec = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
        self.warmup, self.players = warmup, players

    def configure(self, recipe: Recipe) -> None:
        # every duration is parsed now, so that a mistake is found before anything is built
        one_step_each = {"samples": 1, "global_batch": 1, "tokens": 1}
        self._schedule(10**9, one_step_each)

    def run_begins(self, run: Trainer) -> None:
        units = {
            "samples": run.samples_per_epoch,
            "global_batch": run.global_batch,
            "tokens": run.tokens_per_epoch,
        }
        self.factor = self._schedule(run.total_steps, units)
        self.base = {
            player: run.recipe.optimizers[player]["learning_rate"]
            for player in self.players or run.engines
        }

    def step_begins(self, run: Trainer) -> None:
        factor = self.factor(run.step)
        for player, rate in self.base.items():
            run.engines[player].set_learning_rate(rate * factor)

    def _schedule(self, total: int, units: dict[str, Any]) -> schedules.Schedule:
        def in_steps(value: Any) -> Any:
            if isinstance(value, list):
                return [in_steps(part) for part in value]
            return Duration.parse(value).steps(**units) if isinstance(value, str) else value

        arguments = {key: in_steps(value) for key, value in self.spec.items() if key != "name"}
        warmup = in_steps(self.warmup) if self.warmup != "0 steps" else 0
        return schedules.build(
            self.spec["name"], total, warmup, "learning_rate_decay.schedule", **arguments
        )
