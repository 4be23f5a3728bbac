"""Look at what a model makes: a grid of samples from the same noise, every so often."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from dist_train import randomness
from dist_train.callbacks import Callback
from dist_train.errors import UserError
from dist_train.objectives import Objective
from dist_train.pictures.png import save_grid

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.networks import Networks
    from dist_train.trainer import Trainer

__all__ = ["Samples", "save_grid"]


class Samples(Callback):
    """Draw `count` samples from the same noise each time, into `samples/` and the row of the step. Where the objective
    completes images, also those of the first evaluation batch.

    Args:
        every: how often, as "1 epoch"; also at the end.
        weights: "live", or the name of a callback that averages them ("ema").
    """

    priority = 60

    def __init__(self, every: str = "1 epoch", count: int = 64, weights: str = "live") -> None:
        if count < 1:
            raise UserError(f"count: must be at least 1, got {count}")
        self.every, self.count, self.weights_of = every, count, weights

    def run_begins(self, run: Trainer) -> None:
        run.check_weights(self.weights_of, "callbacks.samples.weights")

    def step_ends(self, run: Trainer) -> None:
        if not (run.every(self.every) or run.is_last):
            return
        run.leave_if_told()
        networks = run.view(self.weights_of)  # gathered by all ranks; the rest is rank 0's
        drawn = self._drawn(run, networks) if run.world.is_main else {}
        for name in run.world.agree(list(drawn)):
            run.images(name, drawn.get(name))

    def _drawn(self, run: Trainer, networks: Networks) -> dict[str, Tensor]:
        randomness.reseed(run.seed, 0, randomness.EVALUATION, 0)
        with torch.no_grad():
            drawn = run.objective.samples(networks, self.count, run.world.device)
            drawn = drawn | _completions(run, networks)
        if not drawn:
            logging.getLogger(__name__).warning(
                "callbacks.samples: %s has no samples to draw", type(run.objective).__name__
            )
        return drawn


def _completions(run: Trainer, networks: Networks) -> dict[str, Tensor]:
    """Of rank 0's first evaluation batch, which is that of any number of ranks."""
    if run.evaluation is None or type(run.objective).completions is Objective.completions:
        return {}
    micro = next(iter(run.evaluation)).to(run.world.device)
    return run.objective.completions(networks, micro)
