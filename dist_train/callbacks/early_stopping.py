"""Early stopping: when validation has not improved for a while, rewind to the best and end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dist_train import checkpoint
from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer


class EarlyStopping(Callback):
    """Stop after `patience` evaluations without a new best, with the weights of the best step, bit for bit.

    Watches the metric that `evaluate: {best: ..., mode: ...}` names.
    """

    priority = 50

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise UserError(f"early_stopping: patience must be at least 1, got {patience}")
        self.patience = patience
        self.checks = 0

    def configure(self, recipe: Recipe) -> None:
        if recipe.evaluate is None or recipe.evaluate.best is None:
            raise UserError("callbacks.early_stopping: needs evaluate.best, the metric to watch")
        if "checkpoint" not in {spec["name"] for spec in recipe.callback_specs.values()}:
            raise UserError(
                "callbacks.early_stopping: needs callbacks.checkpoint, which keeps the best weights"
            )

    def evaluated(self, run: Trainer, results: dict[str, float]) -> None:
        if not run.evaluation_counts:
            return
        self.checks = 0 if run.best.get("step") == run.step else self.checks + 1
        if self.checks < self.patience or run.step >= run.total_steps:
            return
        metric, step = run.recipe.evaluate.best, run.best.get("step")  # type: ignore[union-attr]
        went = f"back to step {step}" if step is not None else "it was never a number"
        run.stop(f"{metric} has not improved for {self.checks} evaluations: {went}")
        logging.getLogger("dist_train").info(run.stopping)
        if step is not None:
            best = checkpoint.open_whole(checkpoint.at(run.directory.checkpoints, step))
            run.load_weights(best)
            run.load_callbacks(best)

    def state_dict(self) -> dict[str, Any]:
        return {"checks": self.checks}

    def load_state_dict(self, state: Any) -> None:
        self.checks = state["checks"]
