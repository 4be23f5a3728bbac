"""Lengths of training as a person writes them (`20 epochs`, `500 steps`), turned into steps by exact arithmetic.

Law 4: schedules, `every` and the end of a run are pure functions of the step, the same for any number of ranks. So an
epoch is N / B steps as a fraction, never a float, and nothing is counted while training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dist_train.errors import UserError, nearest

UNITS = ("steps", "epochs", "samples", "tokens", "turns")
LONGEST = 10**15
SEARCHED_STEPS = 100_000
"""A player whose turn does not come within so many steps has no turn."""

_PATTERN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?) +(?:(?P<player>[A-Za-z_]\w*) +)?(?P<unit>[a-z]+)"
)


@dataclass(frozen=True)
class Duration:
    """So much training: `amount` of `unit`, and for turns, whose."""

    amount: Fraction
    unit: str
    player: str | None = None

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read `20 epochs`, `0.5 epochs`, `500 steps`, `1e6 tokens`, `5000 generator turns`; raises UserError."""
        if isinstance(text, int | float) and not isinstance(text, bool):
            raise UserError(
                f"got {text}, expected a number with its unit: '{text} steps' and '{text} epochs' are not the same"
            )
        match = _PATTERN.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise UserError(
                f"got {text!r}, expected a positive number and a unit, like '20 epochs' or '500 steps'"
            )
        unit, player = match["unit"], match["player"]
        if unit not in UNITS and f"{unit}s" in UNITS:
            unit += "s"
        if unit not in UNITS:
            raise UserError(
                f"got {text!r}, expected one of the units {', '.join(UNITS)}{nearest(unit, UNITS)}"
            )
        if (unit == "turns") != (player is not None):
            raise UserError(
                f"got {text!r}, expected a player before 'turns' and nowhere else: '5000 generator turns'"
            )
        amount = Fraction(match["number"])
        if not 0 < amount <= LONGEST:
            raise UserError(f"got {text!r}, expected more than 0 and at most {LONGEST:.0e}")
        if unit != "epochs" and amount.denominator != 1:
            raise UserError(f"got {text!r}, expected a whole number: only epochs can be fractions")
        return cls(amount, unit, player)

    def __str__(self) -> str:
        number = str(self.amount) if self.amount.denominator == 1 else f"{float(self.amount):g}"
        player = f"{self.player} " if self.player else ""
        return f"{number} {player}{self.unit[:-1] if self.amount == 1 else self.unit}"

    def exact_steps(
        self,
        *,
        samples: int | None = None,
        global_batch: int | None = None,
        tokens: int | None = None,
    ) -> Fraction:
        """This duration in steps, as a fraction. See `steps` for the arguments; turns have no fixed length."""
        if self.unit == "steps":
            return self.amount
        if self.unit == "turns":
            raise UserError(
                f"'{self}' has no fixed number of steps: expected steps, epochs, samples or tokens"
            )
        if not global_batch:
            raise UserError(
                f"'{self}' in steps depends on the global batch, which is not known here"
            )
        if self.unit == "samples":
            return self.amount / global_batch
        if not samples:
            raise UserError(
                f"'{self}' in steps depends on the number of samples, which is not known here"
            )
        if self.unit == "epochs":
            return self.amount * samples / global_batch
        if not tokens:
            raise UserError(
                f"'{self}': these data have no tokens; expected steps, epochs or samples"
            )
        return self.amount * samples / (tokens * global_batch)

    def steps(
        self,
        *,
        samples: int | None = None,
        global_batch: int | None = None,
        tokens: int | None = None,
        turns: Callable[[str, int], int] | None = None,
    ) -> int:
        """The number of steps that reach this duration: k epochs of N samples in batches of B are ceil(k N / B).

        Args:
            samples: N, the samples of an epoch.
            global_batch: B, the samples of a step.
            tokens: the tokens of an epoch; a token count is taken at the mean tokens a sample.
            turns: (player, step) -> how many turns that player has in that step.
        """
        if self.unit != "turns":
            return math.ceil(
                self.exact_steps(samples=samples, global_batch=global_batch, tokens=tokens)
            )
        if turns is None or self.player is None:
            raise UserError(f"'{self}': whose turn it is is not known here")
        done = step = last = 0
        while done < self.amount:
            count = turns(self.player, step)
            step += 1
            done, last = done + count, step if count else last
            if step - last > SEARCHED_STEPS:
                raise UserError(f"'{self}': '{self.player}' has no turn in {SEARCHED_STEPS} steps")
        return step


@dataclass(frozen=True, eq=False)
class Every:
    """A rhythm: it fires at the first step past each multiple of its period.

    It is asked at every step, so it is its own key: to hash a fraction takes longer than the answer.
    """

    period: Duration

    @classmethod
    def parse(cls, text: object) -> Every:
        """Read `1 epoch`, `500 steps`, `10000 samples`; raises UserError."""
        return _parse_every(text) if isinstance(text, str) else cls(Duration.parse(text))

    def __str__(self) -> str:
        return str(self.period)

    def fires(
        self,
        step: int,
        *,
        samples: int | None = None,
        global_batch: int | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Whether a boundary lies in (step - 1, step], where `step` counts the completed steps."""
        numerator, denominator = _ratio(self, samples, global_batch, tokens)
        return step > 0 and step * denominator % numerator < denominator


@lru_cache(maxsize=256)
def _parse_every(text: str) -> Every:
    period = Duration.parse(text)
    if period.unit == "turns":
        raise UserError(f"got {text!r}, expected steps, epochs, samples or tokens")
    return Every(period)


@lru_cache(maxsize=256)
def _ratio(
    every: Every, samples: int | None, global_batch: int | None, tokens: int | None
) -> tuple[int, int]:
    """The period in steps as a numerator and a denominator."""
    period = every.period.exact_steps(samples=samples, global_batch=global_batch, tokens=tokens)
    return period.numerator, period.denominator
