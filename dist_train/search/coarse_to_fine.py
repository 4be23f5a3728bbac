"""Coarse to fine: wide and short first, then narrow and long."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dist_train.search import Leg, Search, Trial, at_least, between
from dist_train.search.space import Space


class CoarseToFine(Search):
    """Stages of random search. The first is wide and its runs are short; each next one lies in the box around the best
    of the one before, and its runs are longer; those of the last are whole.

    A short run is a whole run of that duration: its schedules end with it. A stage waits for the one before.

    Args:
        trials: how many in all, shared out evenly. stages: how many stages.
        keep: how many of a stage's best the next stage's box is drawn around.
        short: the duration of a stage's runs, of those of the next.
        margin: by how much of a range the box is wider than what it is drawn around, on each side.
    """

    def __init__(
        self,
        space: Space,
        seed: int,
        trials: int,
        stages: int = 2,
        keep: int = 3,
        short: float = 0.25,
        margin: float = 0.1,
    ) -> None:
        self.space, self.seed = space, seed
        self.stages, self.keep = at_least("stages", stages, 1), at_least("keep", keep, 1)
        self.trials = at_least("trials", trials, self.stages)
        self.short = Fraction(str(between("short", short, 0.001, 1.0)))
        self.margin = between("margin", margin, 0.0, 1.0)

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        number, space, first = len(trials), self.space, 0
        if number >= self.trials:
            return None
        for stage in range(self.stages):
            size = self._size(stage)
            if number < first + size:
                share = self.short ** (self.stages - 1 - stage)
                values = space.drawn(self.seed, number)
                return Leg(number, values, share, shortened=share < 1)
            before = trials[first : first + size]
            if any(trial.running for trial in before):
                return None
            chosen = sorted(before, key=lambda trial: trial.loss)[: self.keep]
            space = space.around([trial.values for trial in chosen], self.margin)
            first += size
        return None

    def _size(self, stage: int) -> int:
        """The trials of a stage; the first ones have what is left over."""
        return self.trials // self.stages + (stage < self.trials % self.stages)

    def legs(self) -> int:
        return self.trials
