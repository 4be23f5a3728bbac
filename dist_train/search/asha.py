"""Asynchronous successive halving."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dist_train.search import Leg, Search, Trial, at_least
from dist_train.search.space import Space


class AsynchronousSuccessiveHalving(Search):
    """ASHA (Li et al., 2020): many trials are begun, and the best of those that have come to a rung go on to the next.

    A trial that is promoted goes on from its own checkpoint, under the schedules of the whole run. Nobody waits: who is
    promoted depends on who has come to the rung by then, so with several trials at once the order of their ends counts.

    Args:
        trials: how many are begun; fewer than factor ** (rungs - 1) would leave nobody to come to the end.
        factor: one of so many goes on from each rung, which is so many times as far as the one before.
        rungs: how many there are; the last is the recipe's whole duration.
    """

    pauses = True
    ordered = False

    def __init__(
        self, space: Space, seed: int, trials: int, factor: int = 3, rungs: int = 3
    ) -> None:
        self.space, self.seed = space, seed
        self.factor, self.rungs = at_least("factor", factor, 2), at_least("rungs", rungs, 1)
        self.trials = at_least("trials", trials, self.factor ** (self.rungs - 1))

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        for rung in reversed(range(self.rungs - 1)):
            there = [
                (trial.losses[rung], number)
                for number, trial in enumerate(trials)
                if len(trial.losses) > rung and trial.losses[rung] is not None
            ]
            for loss, number in sorted(there)[: len(there) // self.factor]:
                if len(trials[number].legs) == rung + 1 and loss != float("inf"):
                    return Leg(number, trials[number].values, self._share(rung + 1))
        if len(trials) < self.trials:
            return Leg(len(trials), self.space.drawn(self.seed, len(trials)), self._share(0))
        return None

    def _share(self, rung: int) -> Fraction:
        return Fraction(1, self.factor ** (self.rungs - 1 - rung))

    def legs(self) -> int:
        return sum(self.trials // self.factor**rung for rung in range(self.rungs))
