"""One run whose learning rate rises from nothing to too much: where does the loss fall fastest, where does it break?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_train.callbacks import Callback
from dist_train.errors import UserError
from dist_train.pictures import plots
from dist_train.pictures.charts import smooth
from dist_train.run_directory import write_file

if TYPE_CHECKING:
    from dist_train.recipe import Recipe
    from dist_train.trainer import Trainer

DIVERGED = 4.0
"""The sweep ends where the loss exceeds so many times its lowest."""
FIRST = 10
"""So many steps are taken before that is asked."""


class RateSweep(Callback):
    """rate(step) = low (high / low)^(step / (N - 1)) over the N steps of the run (Smith 2017, arXiv:1506.01186).

    Writes `learning-rate.json` and `plots/learning-rate.png`. It reads the loss of every step, so it is for a
    diagnosis, not for training.
    """

    priority = 70

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low < high < math.inf:
            raise UserError(f"expected rates 0 < from < to, got {low} and {high}")
        self.low, self.high = low, high
        self.points: list[tuple[float, float]] = []

    def configure(self, recipe: Recipe) -> None:
        plots.need_matplotlib("diagnose learning-rate")
        if len(recipe.players) != 1:
            raise UserError(
                f"diagnose learning-rate: needs one player, but there are {', '.join(recipe.players)}:"
                " losses of players that work against each other tell nothing"
            )

    def step_begins(self, run: Trainer) -> None:
        share = run.step / max(1, run.total_steps - 1)
        self.rate = self.low * (self.high / self.low) ** share
        for engine in run.engines.values():
            engine.set_learning_rate(self.rate)

    def step_ends(self, run: Trainer) -> None:
        (loss,) = run.losses.values()
        value = float(run.world.sum_(loss.double().clone()))
        if math.isfinite(value):
            self.points.append((self.rate, value))
        lowest = min((loss for _, loss in self.points), default=math.inf)
        broke = not math.isfinite(value) or value > DIVERGED * lowest
        if broke and run.step >= FIRST:
            run.stop(f"the loss broke at a learning rate of {self.rate:.2g}")

    def run_ends(self, run: Trainer) -> None:
        self._tell(run)

    def failed(self, run: Trainer, error: BaseException) -> None:
        self._tell(run)  # gradients that are not finite end a run, and the sweep has seen its end

    def _tell(self, run: Trainer) -> None:
        if not run.world.is_main or len(self.points) < FIRST:
            return
        suggested = steepest(self.points)
        found = {"suggested": suggested, "broke": run.stopping, "points": self.points}
        write_file(run.directory.path / "learning-rate.json", json.dumps(found).encode())
        rates, losses = zip(*self.points, strict=True)
        smoothed = [loss for _, loss in smooth(self.points)]
        plots.line_plot(
            run.directory.plots / "learning-rate.png",
            [("loss", {"a step": (rates, losses), "smoothed": (rates, smoothed)})],
            x_label="learning rate",
            log_x=True,
            marks={f"suggested: {suggested:.2g}": suggested},
        )


def steepest(points: Sequence[tuple[float, float]]) -> float:
    """The rate at which the smoothed loss falls fastest, by the logarithm of the rate, on the way to its lowest."""
    smoothed = smooth(points)
    lowest = min(range(len(smoothed)), key=lambda i: smoothed[i][1])
    reach = max(1, len(smoothed) // 20)
    slopes = {
        i: (smoothed[i + reach][1] - smoothed[i - reach][1])
        / math.log(smoothed[i + reach][0] / smoothed[i - reach][0])
        for i in range(reach, min(lowest, len(smoothed) - reach - 1) + 1)
        if i + reach < len(smoothed)
    }
    if not slopes:  # the loss never fell: less than anything that was tried
        return smoothed[0][0]
    return smoothed[min(slopes, key=lambda i: slopes[i])][0]
