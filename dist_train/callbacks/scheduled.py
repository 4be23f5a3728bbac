"""A scalar on a schedule of the global step: what `learning_rate_decay` and `schedule` share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dist_train import schedules
from dist_train.callbacks import Callback
from dist_train.duration import Duration
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class Scheduled(Callback, ABC):
    """Applies a schedule's factor before every step.

    Of all schedules only `plateau` has state: how often the best evaluation has not come for `patience` evaluations.

    Args:
        schedule: a name (`cosine`), or `{name: step, every: 5 epochs, factor: 0.1}`; durations inside it may be in any
            unit.
        warmup: how long the factor rises linearly to 1 first.
    """

    priority = 10

    def __init__(self, schedule: str | dict[str, Any], warmup: str, where: str) -> None:
        self.spec: dict[str, Any] = (
            {"name": schedule} if isinstance(schedule, str) else dict(schedule)
        )
        if "name" not in self.spec:
            raise UserError(f"schedule: got {schedule}, expected one with a name")
        self.warmup, self.where = warmup, where
        self.watches = self.spec["name"] == "plateau"
        self.best: float | None = None
        self.checks = self.cuts = 0

    @abstractmethod
    def _apply(self, run: Trainer, factor: float) -> None:
        """Set the scalar to `factor` times its base, for the step that begins."""

    def configure(self, recipe: Recipe) -> None:
        # every duration is parsed now, so that a mistake is found before anything is built
        one_step_each = {"samples": 1, "global_batch": 1, "tokens": 1}
        self._schedule(10**9, one_step_each)
        if self.watches and (recipe.evaluate is None or recipe.evaluate.best is None):
            raise UserError(f"{self.where}: plateau needs evaluate.best, the metric to watch")

    def run_begins(self, run: Trainer) -> None:
        units = {
            "samples": run.samples_per_epoch,
            "global_batch": run.global_batch,
            "tokens": run.tokens_per_epoch,
        }
        self.factor = self._schedule(run.total_steps, units)

    def step_begins(self, run: Trainer) -> None:
        self._apply(run, self.factor(run.step, self.cuts))

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        if not (self.watches and run.evaluation_counts):
            return
        section = run.recipe.evaluate
        assert section is not None and section.best is not None
        value, sign = results[section.best], 1 if section.mode == "max" else -1
        is_best = self.best is None or sign * value > sign * self.best
        if is_best and not math.isnan(value):
            self.best, self.checks = value, 0
            return
        self.checks += 1
        if self.checks >= self.spec.get("patience", schedules.PATIENCE):
            self.cuts, self.checks = self.cuts + 1, 0

    def state_dict(self) -> dict[str, Any]:
        if not self.watches:
            return {}
        return {"best": self.best, "checks": self.checks, "cuts": self.cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.watches:
            self.best, self.checks, self.cuts = state["best"], state["checks"], state["cuts"]

    def _schedule(self, total: int, units: dict[str, Any]) -> schedules.Schedule:
        def in_steps(value: Any) -> Any:
            if isinstance(value, list):
                return [in_steps(part) for part in value]
            return Duration.parse(value).steps(**units) if isinstance(value, str) else value

        arguments = {key: in_steps(value) for key, value in self.spec.items() if key != "name"}
        warmup = in_steps(self.warmup) if self.warmup != "0 steps" else 0
        return schedules.build(self.spec["name"], total, warmup, self.where, **arguments)
