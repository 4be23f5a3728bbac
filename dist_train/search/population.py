"""Population based training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dist_train.errors import UserError
from dist_train.search import Leg, Search, Trial, at_least, between
from dist_train.search.space import Space, draw

CHANGEABLE = ("optimizer", "objective", "callbacks", "model")
"""What a run may change at a checkpoint; other sections decide which samples it takes, or what a step is."""


class PopulationBasedTraining(Search):
    """Population based training (Jaderberg et al., 2017): a population of runs; after each generation the worst take
    the checkpoint of one of the best (exploit), and change its settings a little (explore).

    What comes out is a schedule of settings, not a setting: each change is an amendment of its run. A generation waits
    for all of its members (the paper's do not wait), so the order in which they end does not matter.

    Args:
        population: how many runs. generations: into how many parts each is cut.
        worst: the share that is replaced, each by one of the best, of the same number.
        resample: how likely a setting is drawn anew instead of moved to 0.8 or 1.2 of what it was.
    """

    pauses = True
    exchanges = True

    def __init__(
        self,
        space: Space,
        seed: int,
        population: int = 8,
        generations: int = 5,
        worst: float = 0.25,
        resample: float = 0.25,
    ) -> None:
        self.space, self.seed = space, seed
        self.population = at_least("population", population, 2)
        self.generations = at_least("generations", generations, 2)
        self.replaced = max(1, int(between("worst", worst, 0.01, 0.5) * population))
        self.resample = between("resample", resample, 0.0, 1.0)
        for key in space.dimensions:
            if key.partition(".")[0] not in CHANGEABLE:
                raise UserError(
                    f"space.{key}: population based training changes it while a run goes on,"
                    f" expected a key of {', '.join(CHANGEABLE)}"
                )

    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        if len(trials) < self.population:
            number = len(trials)
            return Leg(number, self.space.drawn(self.seed, number), self._share(0))
        generation = min(len(trial.legs) for trial in trials)
        if generation == self.generations:
            return None
        past = [trial.losses[generation - 1] for trial in trials]
        if None in past or all(loss == math.inf for loss in past):
            return None
        behind = [n for n, trial in enumerate(trials) if len(trial.legs) == generation]
        return self._next(trials, behind[0], generation)

    def _next(self, trials: Sequence[Trial], number: int, generation: int) -> Leg:
        """A member's leg, after so many generations."""
        past = [trial.losses[generation - 1] or 0.0 for trial in trials]
        order = sorted(range(len(trials)), key=lambda n: (past[n], n))
        failed = [n for n in order if past[n] == math.inf]
        worst = {*order[-self.replaced :], *failed}
        best = [n for n in order[: self.replaced] if n not in worst]
        share = self._share(generation)
        if number not in worst or not best:
            return Leg(number, trials[number].values, share)
        pick = draw(self.seed, "donor", number, generation)
        donor = best[int(pick * len(best))]
        values = trials[donor].legs[generation - 1].values
        return Leg(number, self._explored(values, number, generation), share, donor=donor)

    def _explored(self, values: Mapping[str, Any], number: int, generation: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, dimension in self.space.dimensions.items():
            if not self.space.applies(key, found):
                continue
            name = (key, number, generation)
            if key not in values or draw(self.seed, "resample", *name) < self.resample:
                found[key] = dimension.at(draw(self.seed, *name))
            else:
                up = draw(self.seed, "direction", *name) < 0.5
                found[key] = dimension.perturbed(values[key], up)
        return found

    def _share(self, generation: int) -> Fraction:
        return Fraction(generation + 1, self.generations)

    def legs(self) -> int:
        return self.population * self.generations
