"""Evaluation on its schedule, and the memory of the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dist_train.callbacks import Callback

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


class Evaluate(Callback):
    """The recipe's `evaluate:` section: evaluate every so often and at the end, and know which step was best."""

    priority = 40

    def __init__(self, every: str, best: str | None, mode: str, weights: str) -> None:
        self.every, self.best, self.mode, self.weights_of = every, best, mode, weights

    def run_begins(self, run: Trainer) -> None:
        run.check_weights(self.weights_of, "evaluate.weights")

    def step_ends(self, run: Trainer) -> None:
        if run.every(self.every) or run.is_last:
            for name, value in run.evaluate(self.weights_of).items():
                run.record(f"evaluate/{name}", value)

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        if self.best is None or not run.evaluation_counts or math.isnan(results[self.best]):
            return
        value = results[self.best]
        before = run.best.get("value")
        sign = 1 if self.mode == "max" else -1
        if before is None or sign * value > sign * before:
            run.best = {"step": run.step, "value": value, "metric": self.best}
