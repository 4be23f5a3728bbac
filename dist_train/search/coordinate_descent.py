"""Coordinate descent: one key at a time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from dist_train.search import Leg, Search, Trial, at_least, between
from dist_train.search.space import Choice, Dimension, Space


class CoordinateDescent(Search):
    """One key after the other: some values of it, the others as in the best trial so far; then the next key, and after
    the last key again, in a smaller range around the best.

    The values of one key are trained side by side, and the search waits for all of them, so the order in which they
    end does not matter. It finds the optimum where keys do not depend on each other, and can miss it where they do.

    Args:
        points: values of a range that are tried each time, both ends of it among them; of a choice all.
        rounds: how often each key has its turn.
        shrink: the width of a range in the next round, of that in this one.
    """

    def __init__(
        self, space: Space, seed: int, points: int = 5, rounds: int = 3, shrink: float = 0.5
    ) -> None:
        self.space = space
        self.points, self.rounds = at_least("points", points, 2), at_least("rounds", rounds, 1)
        self.shrink = between("shrink", shrink, 0.01, 1.0)

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        walk = self._walk()
        wanted = next(walk)
        asked = 0
        while wanted is not None:
            here = trials[asked : asked + len(wanted)]
            if len(here) < len(wanted):
                return Leg(len(trials), wanted[len(here)])
            if any(trial.running for trial in here):
                return None
            asked += len(wanted)
            wanted = walk.send([trial.loss for trial in here])
        return None

    def legs(self) -> int:
        sizes = [len(dimension.grid(self.points)) for dimension in self.space.dimensions.values()]
        return 1 + self.rounds * sum(sizes)

    def _walk(self) -> Generator[list[dict[str, Any]] | None, list[float], None]:
        """Yields the settings to try side by side, is sent their losses, and ends with None."""
        place = self.space.values(dict.fromkeys(self.space.dimensions, 0.5))
        [loss] = yield [place]
        for turn in range(self.rounds):
            for key, dimension in self.space.dimensions.items():
                if key not in place:
                    continue
                values = self._values(dimension, place[key], self.shrink**turn)
                tried = [self._with(place, key, value) for value in values if value != place[key]]
                losses: list[float] = (yield tried) if tried else []
                for settings, found in zip(tried, losses, strict=True):
                    if found < loss:
                        place, loss = settings, found
        yield None

    def _values(self, dimension: Dimension, value: Any, width: float) -> list[Any]:
        if isinstance(dimension, Choice):
            return list(dimension.values)
        return dimension.around([value], width / 2).grid(self.points)

    def _with(self, place: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
        """The settings with one of them changed, and what comes or goes with it."""
        found: dict[str, Any] = {}
        for name, dimension in self.space.dimensions.items():
            if self.space.applies(name, found):
                found[name] = value if name == key else place.get(name, dimension.at(0.5))
        return found
