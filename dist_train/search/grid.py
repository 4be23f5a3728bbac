"""Grid search: every combination."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dist_train.errors import UserError
from dist_train.search import Leg, Search, Trial, at_least
from dist_train.search.space import Space

MOST = 100_000


class Grid(Search):
    """Every combination of the values of each key, the last key changing fastest.

    Args:
        points: how many values of a range, both ends among them; of a choice all are taken.
    """

    def __init__(self, space: Space, seed: int, points: int = 5) -> None:
        at_least("points", points, 1)
        self.combinations = list(itertools.islice(space.grid(points), MOST + 1))
        if len(self.combinations) > MOST:
            raise UserError(f"points: got {points}, which makes more than {MOST:,} trials")

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        number = len(trials)
        return Leg(number, self.combinations[number]) if number < self.legs() else None

    def legs(self) -> int:
        return len(self.combinations)
