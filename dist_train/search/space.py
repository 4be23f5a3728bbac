"""The space of a sweep: recipe keys, and what each of them may be.

Every setting has a place in [0, 1] (its place in the cumulative distribution), so that a search knows unit cubes alone:
`at(place)` is a value, `place(value)` its place.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

from dist_train.errors import UserError, nearest
from dist_train.settings import short

EDGE = 1e-3
"""Where a normal distribution is cut off: 0.1 % on each side."""
MOST_VALUES = 1000


def draw(seed: int, *key: object) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the key."""
    text = "/".join(map(str, (seed, *key)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


class Dimension(ABC):
    """What one key may be."""

    @abstractmethod
    def at(self, place: float) -> Any:
        """The value at a place from 0 to 1."""

    @abstractmethod
    def place(self, value: Any) -> float:
        """The place of a value, `at(place(value)) == value`."""

    @abstractmethod
    def grid(self, points: int) -> list[Any]:
        """Values evenly over the whole, both ends among them: at most `points`, of a choice all."""

    @abstractmethod
    def around(self, values: Sequence[Any], margin: float) -> Dimension:
        """What is left of it when only these values and those within `margin` of their places are of interest."""

    @abstractmethod
    def perturbed(self, value: Any, up: bool) -> Any:
        """A neighbour of a value: 1.2 or 0.8 of a number, the next or the last of a choice."""

    def corners(self) -> list[Any]:
        """The values that a check has to try."""
        return self.grid(2)


@dataclass(frozen=True)
class Choice(Dimension):
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def at(self, place: float) -> Any:
        return self.values[min(int(place * len(self.values)), len(self.values) - 1)]

    def place(self, value: Any) -> float:
        return (self.values.index(value) + 0.5) / len(self.values)

    def grid(self, points: int) -> list[Any]:
        return list(self.values)

    def around(self, values: Sequence[Any], margin: float) -> Dimension:
        return Choice(tuple(value for value in self.values if value in values))

    def perturbed(self, value: Any, up: bool) -> Any:
        index = self.values.index(value) + (1 if up else -1)
        return self.values[max(0, min(index, len(self.values) - 1))]


@dataclass(frozen=True)
class Range(Dimension):
    """Numbers from `low` to `high`, evenly or (`log`) evenly in their logarithm, perhaps only each `step`-th."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def at(self, place: float) -> Any:
        low, high = self._bounds()
        value = low + place * (high - low)
        return self._rounded(math.exp(value) if self.log else value)

    def place(self, value: Any) -> float:
        low, high = self._bounds()
        inner = math.log(value) if self.log else value
        return min(1.0, max(0.0, (inner - low) / (high - low))) if high > low else 0.5

    def grid(self, points: int) -> list[Any]:
        if self.step is not None and not self.log:
            points = min(points, self._steps + 1)
        places = [i / (points - 1) for i in range(points)] if points > 1 else [0.5]
        return list(dict.fromkeys(self.at(place) for place in places))

    def around(self, values: Sequence[Any], margin: float) -> Dimension:
        places = [self.place(value) for value in values]
        low, high = max(0.0, min(places) - margin), min(1.0, max(places) + margin)
        return replace(self, low=self.at(low), high=self.at(high))

    def perturbed(self, value: Any, up: bool) -> Any:
        moved = value * (1.2 if up else 0.8)
        if self.step is not None and self._rounded(moved) == value:
            moved = value + (self.step if up else -self.step)
        return self._rounded(min(max(moved, self.low), self.high))

    def _bounds(self) -> tuple[float, float]:
        return (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)

    @property
    def _steps(self) -> int:
        assert self.step is not None
        return math.floor((self.high - self.low) / self.step + 1e-9)

    def _rounded(self, value: float) -> Any:
        """Within the bounds, on a step, and with the 12 digits that two machines' logarithms agree on."""
        if self.step is not None:
            count = min(max(round((value - self.low) / self.step), 0), self._steps)
            value = self.low + count * self.step
            if float(self.low).is_integer() and float(self.step).is_integer():
                return round(value)
        return float(f"{min(max(value, self.low), self.high):.12g}")


@dataclass(frozen=True)
class Normal(Dimension):
    """Numbers around `mean`, with a standard deviation; the outermost 0.2 % are left out."""

    mean: float
    deviation: float
    low: float = 0.0
    high: float = 1.0
    """The part of the distribution that is of interest, as places of the whole."""

    def at(self, place: float) -> Any:
        inner = self.low + place * (self.high - self.low)
        inner = EDGE + inner * (1 - 2 * EDGE)
        return float(f"{NormalDist(self.mean, self.deviation).inv_cdf(inner):.12g}")

    def place(self, value: Any) -> float:
        inner = (NormalDist(self.mean, self.deviation).cdf(value) - EDGE) / (1 - 2 * EDGE)
        return min(1.0, max(0.0, (inner - self.low) / (self.high - self.low)))

    def grid(self, points: int) -> list[Any]:
        """At the middle of `points` parts that are equally likely."""
        return [self.at((i + 0.5) / points) for i in range(points)]

    def around(self, values: Sequence[Any], margin: float) -> Dimension:
        span = self.high - self.low
        places = [self.low + self.place(value) * span for value in values]
        low, high = max(0.0, min(places) - margin * span), min(1.0, max(places) + margin * span)
        return replace(self, low=low, high=high)

    def perturbed(self, value: Any, up: bool) -> Any:
        moved = value + (0.5 if up else -0.5) * self.deviation
        return min(max(moved, self.at(0.0)), self.at(1.0))

    def corners(self) -> list[Any]:
        return [self.at(0.0), self.at(1.0)]


@dataclass(frozen=True)
class Space:
    """The dimensions by recipe key, and for some keys the condition under which they are there at all.

    `when` is {key: {another key: its values}}; the other key stands before it.
    """

    dimensions: Mapping[str, Dimension]
    when: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)

    def values(self, places: Mapping[str, float]) -> dict[str, Any]:
        """The settings at these places: of each key whose condition holds."""
        found: dict[str, Any] = {}
        for key, dimension in self.dimensions.items():
            if self.applies(key, found):
                found[key] = dimension.at(places[key])
        return found

    def applies(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether a key is there beside the values of those before it."""
        conditions = self.when.get(key, {})
        return all(
            other in values and values[other] in wanted for other, wanted in conditions.items()
        )

    def drawn(self, seed: int, *key: object) -> dict[str, Any]:
        """Settings that depend on nothing but the seed and the key."""
        return self.values({name: draw(seed, name, *key) for name in self.dimensions})

    def grid(self, points: int) -> Iterator[dict[str, Any]]:
        """Every combination, the last key changing fastest."""
        yield from self._combinations(list(self.dimensions), {}, points)

    def _combinations(
        self, keys: list[str], chosen: dict[str, Any], points: int
    ) -> Iterator[dict[str, Any]]:
        if not keys:
            yield chosen
            return
        key, *rest = keys
        if not self.applies(key, chosen):
            yield from self._combinations(rest, chosen, points)
            return
        for value in self.dimensions[key].grid(points):
            yield from self._combinations(rest, {**chosen, key: value}, points)

    def around(self, settings: Sequence[Mapping[str, Any]], margin: float) -> Space:
        """The box around some settings; a key that none of them has stays whole."""
        narrowed = {}
        for key, dimension in self.dimensions.items():
            there = [one[key] for one in settings if key in one]
            narrowed[key] = dimension.around(there, margin) if there else dimension
        return replace(self, dimensions=narrowed)

    def corners(self) -> Iterator[dict[str, Any]]:
        """Settings that together have every corner of every key, for a check: as few as that takes."""
        first = self.values(dict.fromkeys(self.dimensions, 0.0))
        yield first
        for key, dimension in self.dimensions.items():
            for value in dimension.corners():
                chosen = {**first, **self._needed(key), key: value}
                corner: dict[str, Any] = {}
                for name, other in self.dimensions.items():
                    if self.applies(name, corner):
                        corner[name] = chosen.get(name, other.at(0.0))
                yield corner

    def _needed(self, key: str) -> dict[str, Any]:
        """Values of other keys under which a key is there, and theirs under which those are."""
        needed: dict[str, Any] = {}
        for other, wanted in self.when.get(key, {}).items():
            needed |= {other: wanted[0]} | self._needed(other)
        return needed


# ---------------------------------------------------------------------------------------------------------------------
# Read from YAML

KINDS = ("choice", "uniform", "log_uniform", "integers", "log_integers", "normal")


def read_space(settings: Any, where: str) -> Space:
    """A space from `{key: {log_uniform: [1e-4, 1e-1]}, key: [one, another]}`; raises UserError."""
    if not isinstance(settings, dict) or not settings:
        raise UserError(
            f"{where}: got {short(settings)}, expected a mapping {{key of the recipe: {{uniform: [0, 1]}}}}"
        )
    dimensions: dict[str, Dimension] = {}
    conditions: dict[str, Mapping[str, tuple[Any, ...]]] = {}
    for key, spec in settings.items():
        here = f"{where}.{key}"
        if isinstance(spec, list):
            spec = {"choice": spec}
        if not isinstance(spec, dict):
            raise UserError(f"{here}: got {short(spec)}, expected one of {', '.join(KINDS)}")
        if "when" in spec:
            conditions[key] = _condition(spec["when"], f"{here}.when", dimensions)
        dimensions[key] = _dimension({k: v for k, v in spec.items() if k != "when"}, here)
    return Space(dimensions, conditions)


def _condition(
    spec: Any, where: str, before: Mapping[str, Dimension]
) -> Mapping[str, tuple[Any, ...]]:
    if not isinstance(spec, dict) or not spec:
        raise UserError(f"{where}: got {short(spec)}, expected a mapping {{another key: value}}")
    found = {}
    for other, wanted in spec.items():
        if not isinstance(before.get(other), Choice):
            raise UserError(
                f"{where}.{other}: expected the key of a choice that stands above it"
                + nearest(other, before)
            )
        values = tuple(wanted) if isinstance(wanted, list) else (wanted,)
        for value in values:
            if value not in before[other].grid(0):
                raise UserError(
                    f"{where}.{other}: got {short(value)}, expected one of {short(before[other].grid(0))}"
                )
        found[other] = values
    return found


def _dimension(spec: dict[str, Any], where: str) -> Dimension:
    kinds = [key for key in spec if key != "step"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        close = nearest(kinds[0], KINDS) if len(kinds) == 1 else ""
        raise UserError(f"{where}: got {short(spec)}, expected one of {', '.join(KINDS)}{close}")
    kind = kinds[0]
    value, step = spec[kind], spec.get("step")
    where = f"{where}.{kind}"
    if kind == "choice":
        return _choice(value, step, where)
    first, second = _pair(value, where)
    if step is not None and (not _is_number(step) or step <= 0):
        raise UserError(f"{where}: got step {short(step)}, expected a number above 0")
    if kind == "normal":
        if second <= 0 or step is not None:
            raise UserError(
                f"{where}: got {short(spec)}, expected [mean, deviation above 0], without step"
            )
        return Normal(first, second)
    if first >= second:
        raise UserError(f"{where}: got {short(value)}, expected [low, high] with low below high")
    log = kind.startswith("log_")
    if log and first <= 0:
        raise UserError(f"{where}: got {short(value)}, expected numbers above 0")
    if kind.endswith("integers"):
        step = 1 if step is None else step
        if not all(float(number).is_integer() for number in (first, second, step)):
            raise UserError(f"{where}: got {short(spec)}, expected whole numbers")
    if step is not None and step > second - first:
        raise UserError(f"{where}: got step {step}, expected at most {second - first:g}")
    return Range(first, second, log, step)


def _choice(values: Any, step: Any, where: str) -> Choice:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_VALUES or step is not None:
        raise UserError(f"{where}: got {short(values)}, expected a list of values, without step")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"{where}: got {short(value)} twice, expected values that differ")
    return Choice(tuple(values))


def _pair(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        raise UserError(f"{where}: got {short(value)}, expected two numbers [low, high]")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
