"""Random search."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.search import Leg, Search, Trial, at_least
from dist_train.search.space import Space


class RandomSearch(Search):
    """Independent draws (Bergstra and Bengio, 2012): the values of trial i depend on the seed and i alone.

    Args:
        trials: how many.
    """

    def __init__(self, space: Space, seed: int, trials: int) -> None:
        self.space, self.seed, self.trials = space, seed, at_least("trials", trials, 1)

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        number = len(trials)
        return Leg(number, self.space.drawn(self.seed, number)) if number < self.trials else None

    def legs(self) -> int:
        return self.trials
