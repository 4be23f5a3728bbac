"""What a sweep tries next, as a pure function of (space, seed, what is known so far).

A search keeps no state: it is asked with the whole history, and answers with the next leg, so that a sweep that was
killed goes on from its journal alone. A leg is a stretch of one trial's training, and a trial has one leg, or several
where the search pauses it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dist_train.errors import UserError
from dist_train.search.space import Space

WHOLE = Fraction(1)


@dataclass(frozen=True)
class Leg:
    """A stretch of a trial's training.

    Attributes:
        trial: its number; that of a new trial is the count of those before it.
        values: the settings by recipe key.
        share: how far it goes, of the recipe's duration.
        shortened: the recipe's own duration is cut to that share, and its schedules end with it; else they are those of
            the whole run, which is paused there and may go on.
        donor: the trial whose checkpoint of this moment it goes on from, instead of its own.
    """

    trial: int
    values: Mapping[str, Any]
    share: Fraction = WHOLE
    shortened: bool = False
    donor: int | None = None


@dataclass(frozen=True)
class Trial:
    """What is known of a trial: its legs, and for each the loss that it ended with.

    The loss is the objective, turned round where more is better: less is better always, infinite is a failure or a
    divergence, None is a leg that is still trained.
    """

    legs: tuple[Leg, ...]
    losses: tuple[float | None, ...]

    @property
    def values(self) -> Mapping[str, Any]:
        return self.legs[-1].values

    @property
    def running(self) -> bool:
        return self.losses[-1] is None

    @property
    def loss(self) -> float:
        """Of its last leg that has ended; infinite before there is one."""
        ended = [loss for loss in self.losses if loss is not None]
        return ended[-1] if ended else math.inf

    @property
    def reached(self) -> Fraction:
        """How far its last leg that has ended went."""
        ended = [
            leg.share for leg, loss in zip(self.legs, self.losses, strict=True) if loss is not None
        ]
        return ended[-1] if ended else Fraction(0)


class Search(ABC):
    """A way to search. Final subclasses stand in files of their own; `space` and `seed` come first, then what the sweep
    says.

    Attributes:
        pauses: trials stop and go on from their checkpoints, so the recipe must save some.
        exchanges: trials take over checkpoints of others.
        ordered: what is asked next does not depend on the order in which trials end.
    """

    pauses = False
    exchanges = False
    ordered = True

    @abstractmethod
    def ask(self, trials: Sequence[Trial]) -> Leg | None:
        """The next leg; None when there is none before one of those that run has ended, or, if none runs, at all.

        `trials` are in order of their numbers. The first leg of a new trial has the number `len(trials)`.
        """

    @abstractmethod
    def legs(self) -> int:
        """About how many legs it asks for, for a progress bar."""


def best(trials: Sequence[Trial]) -> int | None:
    """The number of the best of those trials that were trained the longest; None before one has ended well."""
    ended = [n for n, trial in enumerate(trials) if math.isfinite(trial.loss)]
    if not ended:
        return None
    longest = max(trials[n].reached for n in ended)
    return min((n for n in ended if trials[n].reached == longest), key=lambda n: trials[n].loss)


def at_least(name: str, value: Any, least: int) -> int:
    """A count that a sweep gives, checked."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 10**6:
        raise UserError(f"{name}: got {value!r}, expected a whole number, {least} or more")
    return value


def between(name: str, value: Any, low: float, high: float) -> float:
    """A number that a sweep gives, checked."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}: got {value!r}, expected a number from {low:g} to {high:g}")
    return float(value)


__all__ = ["WHOLE", "Leg", "Search", "Space", "Trial", "at_least", "best", "between"]
