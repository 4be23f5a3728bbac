"""Who makes the others wait: the rank that comes late to the collective, by the time that each has spent before it."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dist_train.callbacks import Callback
from dist_train.duration import Every

if TYPE_CHECKING:
    from dist_train.trainer import Trainer

BEFORE_COLLECTIVES = {
    "single": ("data", "forward", "backward"),
    "ddp": ("data", "forward", "backward"),
    "zero1": ("data", "forward"),
    "zero2": ("data", "forward"),
}
"""The phases in which a rank waits for nobody, by strategy; under any other, only that of the data."""
WINDOW = 10
SLOWER, SHARE = 1.25, 0.15


class Stragglers(Callback):
    """Every run of several ranks has it. Puts `straggler` into the row of a log interval: the rank that was late.

    Late is a rank whose median time before the collectives was, in this interval and the one before, over 1.25 times
    the median of the others', by more than 15 % of a step. An interval has 10 steps at least. On a GPU the times are
    those of the host, which launches the work: slow data and slow hosts show, a slow GPU does not.
    """

    priority = 70

    def __init__(self, every: str) -> None:
        self.every = Every.parse(every)

    def run_begins(self, run: Trainer) -> None:
        names = {strategy["name"] for strategy in run.recipe.strategies.values()}
        phases = [set(BEFORE_COLLECTIVES.get(name, ("data",))) for name in names]
        self._phases = sorted(set.intersection(*phases))
        self._spent, self._last = self._before(run), time.perf_counter()
        self._own: list[float] = []
        self._steps: list[float] = []
        self._suspect: int | None = None
        self._named: int | None = None

    def step_ends(self, run: Trainer) -> None:
        if run.world.size == 1:
            return
        now, spent = time.perf_counter(), self._before(run)
        self._own.append(spent - self._spent)
        self._steps.append(now - self._last)
        self._spent, self._last = spent, now
        if len(self._own) < WINDOW or not run.every(self.every):
            return
        figures = torch.zeros(run.world.size + 1, dtype=torch.float64, device=run.world.device)
        figures[run.world.rank] = statistics.median(self._own)
        figures[-1] = statistics.median(self._steps) / run.world.size
        *own, step = run.world.sum_(figures).tolist()
        self._own, self._steps = [], []
        late = straggler(own, step)
        if late is not None and late == self._suspect:
            run.record("straggler", late)
            if late != self._named:
                others = statistics.median(own[:late] + own[late + 1 :])
                logging.getLogger("dist_train").warning(
                    "step %d: rank %d keeps the others waiting: %.1f ms before the collective, theirs %.1f ms",
                    *(run.step, late, own[late] * 1e3, others * 1e3),
                )
            self._named = late
        elif late is None:
            self._named = None
        self._suspect = late

    def _before(self, run: Trainer) -> float:
        return sum(run.heartbeat.spent[phase] for phase in self._phases)


def straggler(own: Sequence[float], step: float) -> int | None:
    """The rank that the others wait for, by each rank's seconds before the collective and those of a whole step."""
    slowest = max(range(len(own)), key=own.__getitem__)
    others = statistics.median([*own[:slowest], *own[slowest + 1 :]])
    late = own[slowest] > SLOWER * others and own[slowest] - others > SHARE * step
    return slowest if late else None
