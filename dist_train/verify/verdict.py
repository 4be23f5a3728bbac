"""What differences mean: the bound of each, the first that breaks it, and what usually makes it so."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.verify.parity import Differences

TIMES_FLOOR = 10.0
"""A difference may be so many times what one process shows when it only sums in another order."""
EXACT = ("samples", "start")
"""Kinds that must be the same, bit for bit."""
LEAST = {"loss": 1e-6, "gradient": 1e-6, "state": 1e-4, "free loss": 2e-6, "free weights": 2e-6}
"""Bounds where ten times the floor is less: the rounding of fp32 sums, with room."""
CEILING = 1e-5
"""A loss or gradient that differs by more when one process does the same again shows that it does not repeat itself;
and of a floor above this, no more than this is trusted."""
ALIKE = 1e-3
"""Factors closer than this, relative to their size, are the same factor."""


@dataclass(frozen=True)
class Judged:
    """One difference beside its floor and its bound."""

    step: str
    kind: str
    tensor: str
    difference: float
    factor: float
    floor: float
    bound: float

    @property
    def broken(self) -> bool:
        return not self.difference <= self.bound

    @property
    def share(self) -> float:
        """How much of its bound it takes, by which the worst is chosen; without a bound the difference itself."""
        if math.isinf(self.bound):
            return self.difference
        return self.difference / max(self.bound, sys.float_info.min)

    @property
    def where(self) -> str:
        return f"step {self.step}, {self.tensor}" if self.step else self.tensor


def judge(found: Differences, floor: Differences) -> list[Judged]:
    """Every difference beside its bound: ten times its own floor; of free-running ones, of the largest floor."""
    split = {name: _split(name) for name in found}
    free = {
        kind: max((floor[n][0] for n in floor if _split(n)[1] == kind), default=0.0)
        for kind in ("free loss", "free weights")
    }
    judged = []
    for name, (difference, factor) in found.items():
        step, kind, tensor = split[name]
        low = free.get(kind, floor.get(name, [0.0])[0])
        trusted = min(low, CEILING) if kind in ("loss", "gradient") else low
        bound = 0.0 if kind in EXACT else max(LEAST[kind], TIMES_FLOOR * trusted)
        judged.append(Judged(step, kind, tensor, difference, factor, low, bound))
    return judged


def judge_repeat(repeat: Differences) -> list[Judged]:
    """One process that does the same again: that it repeats itself is what every other bound stands on."""
    return _judge_alone(repeat, {"loss": CEILING, "gradient": CEILING})


def judge_floor(floor: Differences) -> list[Judged]:
    """One process that only rounds otherwise: it starts from the same, and how far that leads is a measurement."""
    return _judge_alone(floor, {})


def _judge_alone(found: Differences, bounds: Mapping[str, float]) -> list[Judged]:
    bounds = {**dict.fromkeys(EXACT, 0.0), **bounds}
    return [
        Judged(*_split(name), difference, factor, difference, bounds.get(_split(name)[1], math.inf))
        for name, (difference, factor) in found.items()
    ]


def summary(judged: Sequence[Judged], ranks: int) -> dict[str, Any]:
    """`{"passed", "worst": {kind: ...}, "first", "broken", "cause"}`: of each kind what comes closest to its bound."""
    worst: dict[str, Judged] = {}
    for one in judged:
        if one.kind not in worst or not one.share <= worst[one.kind].share:
            worst[one.kind] = one
    broken = sorted(
        (one for one in judged if one.broken), key=lambda one: one.kind.startswith("free")
    )
    return {
        "passed": not broken,
        "worst": {
            kind: {
                "difference": w.difference,
                "floor": w.floor,
                "bound": None if math.isinf(w.bound) else w.bound,
                "where": w.where,
            }
            for kind, w in worst.items()
        },
        "first": f"{broken[0].kind} of {broken[0].where}" if broken else None,
        "broken": len(broken),
        "cause": cause(broken, ranks) if broken else "",
    }


def cause(broken: Sequence[Judged], ranks: int) -> str:
    """What usually makes such differences, as far as they tell; empty where they do not.

    Args:
        broken: what broke its bound, the first to do so first.
    """
    first = broken[0]
    together = [one for one in broken if (one.step, one.kind) == (first.step, first.kind)]
    factor = _common(one.factor for one in together)
    scaled = _scaled(factor, ranks)
    if first.kind == "start":
        return "the weights at the start depend on the rank or on the strategy"
    if first.kind == "samples":
        return "the ranks take other samples than one process: a sampler that repeats, skips or shares wrongly"
    if first.kind == "loss":
        return (
            f"the loss is {scaled}: averaged over the ranks once too often, or not at all"
            if scaled
            else "same samples and weights, another loss: draws from a generator of the model's own, a state kept"
            " between forwards, or a mean that each rank takes over its own count (of tokens, say)"
        )
    if first.kind == "gradient":
        if scaled:
            return f"every gradient is {scaled}: a wrong loss scale"
        if factor is not None:
            return f"every gradient is {factor:.4g} times what is due: scaled or clipped by something local"
        return "the losses agree, the gradients do not: they are not, or not all, summed over the ranks"
    if first.kind == "state":
        if not any(one.tensor.startswith(("weights/", "optimizer/")) for one in together):
            times = "" if factor is None else f", {factor:.3g} times as far as is due"
            return (
                f"only buffers differ{times}: one that is updated twice, or by each rank for itself"
            )
        times = "" if factor is None else f" by {factor:.4g} times what is due"
        return f"the gradients agree, but the weights move otherwise{times}: clipping by a local norm, say"
    return ""


def _split(name: str) -> tuple[str, str, str]:
    """`2/gradient/critic.weight` -> ("2", "gradient", "critic.weight"); `free/loss/x` -> ("", "free loss", "x")."""
    step, kind, tensor = name.split("/", 2)
    return ("", f"free {kind}", tensor) if step == "free" else (step, kind, tensor)


def _common(factors: Iterable[float]) -> float | None:
    """The one factor that all share, if they do and it is not 1."""
    values = list(factors)
    middle = sorted(values)[len(values) // 2]
    alike = all(abs(value - middle) <= ALIKE * abs(middle) for value in values)
    return middle if alike and abs(middle - 1) > ALIKE else None


def _scaled(factor: float | None, ranks: int) -> str:
    """`2 times what is due, the number of ranks`, where that is what the factor says."""
    for times, said in (
        (float(ranks), "as many times as there are ranks"),
        (1 / ranks, "divided by the ranks"),
    ):
        if factor is not None and abs(factor - times) <= ALIKE * times:
            return f"{factor:.4g} times what is due, {said}"
    return ""
