"""Schedules: pure functions of the global step that multiply a learning rate or another scalar (law 4).

A schedule is `factor(step, total, warmup, ...)`: `step` counts from 0, `total` is the length of the
run, and the decay starts where the warm-up of `warmup` steps ends. `build` binds the recipe's
arguments and puts the warm-up in front:

    value(step) = ramp(step, warmup) * factor(step, total, warmup, ...)

A function of the user's own may take any of the three by these names. `plateau` alone takes `cuts`, which its callback
counts and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from dist_train.components import arguments, check
from dist_train.errors import UserError

PATIENCE = 3


class Schedule(Protocol):
    """The multiplier at a step; `cuts` is how often a plateau was found so far."""

    def __call__(self, step: int, cuts: int = 0) -> float: ...


def build(
    name: str, total_steps: int, warmup_steps: int = 0, where: str = "schedule", **given: Any
) -> Schedule:
    """Return the multiplier as a function of the step; all durations are in steps.

    The warm-up rises linearly, from 1 / (warmup + 1) at step 0 to 1 at step `warmup`.
    Raises UserError, beginning with `where`, for an unknown name or argument or one out of range.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise UserError(
            f"{where}: warmup: got {warmup_steps} steps, expected at most the {total_steps} of the run"
        )
    clock = ("step", "total", "warmup", "cuts")
    factor = check("schedule", {"name": name, **given}, where, provided=clock)
    taken = arguments(factor)
    ends = {"total": total_steps, "warmup": warmup_steps}
    fixed = given | {name: value for name, value in ends.items() if name in taken}
    by_step, by_cuts = "step" in taken, "cuts" in taken

    def value(step: int, cuts: int = 0) -> float:
        now = {"step": step} if by_step else {}
        if by_cuts:
            now["cuts"] = cuts
        return ramp(step, warmup_steps) * factor(**now, **fixed)

    try:
        value(0)  # what is out of range is refused here, not in the middle of a run
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name}: {error}") from error
    return value


def ramp(step: int, warmup: int) -> float:
    """The linear warm-up, (step + 1) / (warmup + 1) up to 1: no step is wasted at 0."""
    return min(1.0, (step + 1) / (warmup + 1))


def progress(step: int, total: int, warmup: int) -> float:
    """The share of the way from the end of the warm-up to the end of the run, within [0, 1]."""
    return min(1.0, max(0.0, (step - warmup) / max(1, total - warmup)))


def constant(step: int, total: int) -> float:
    """1 throughout."""
    return 1.0


def step(step: int, total: int, every: int, factor: float = 0.1) -> float:
    """Multiply by `factor` after each `every` steps, counted from the start of the run."""
    if every < 1:
        raise UserError(f"every must be 1 step or more, got {every}")
    return factor ** (step // every)


def multi_step(step: int, total: int, milestones: Sequence[int], factor: float = 0.1) -> float:
    """Multiply by `factor` at each of the `milestones`, counted from the start of the run."""
    if list(milestones) != sorted(set(milestones)):
        raise UserError(f"milestones must increase, got {list(milestones)}")
    return factor ** sum(step >= milestone for milestone in milestones)


def exponential(
    step: int, total: int, warmup: int = 0, gamma: float | None = None, end: float | None = None
) -> float:
    """Decay by the factor `gamma` a step, or to `end` at the end of the run."""
    if (gamma is None) == (end is None):
        raise UserError("exponential takes either gamma (a step) or end (of the run)")
    if gamma is not None:
        return positive("gamma", gamma) ** max(0, step - warmup)
    assert end is not None
    return positive("end", end) ** progress(step, total, warmup)


def linear(step: int, total: int, warmup: int = 0, end: float = 0.0) -> float:
    """Fall in a straight line to `end` at the end of the run."""
    return 1.0 + (end - 1.0) * progress(step, total, warmup)


def cosine(step: int, total: int, warmup: int = 0, end: float = 0.0) -> float:
    """Fall along half a cosine to `end` (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * progress(step, total, warmup))) / 2.0


def inverse_sqrt(step: int, total: int, warmup: int = 0, timescale: int | None = None) -> float:
    """Fall as 1 / sqrt(time) after the warm-up: sqrt(s / (s + step - warmup)).

    The timescale s is `warmup` unless given, so that the value is sqrt(warmup / step) (Vaswani et
    al. 2017, arXiv:1706.03762).
    """
    scale = positive("timescale", max(1, warmup) if timescale is None else timescale)
    return math.sqrt(scale / (scale + max(0, step - warmup)))


def one_cycle(
    step: int, total: int, rise: float = 0.3, start: float = 0.04, end: float = 4e-6
) -> float:
    """Rise along half a cosine from `start` to 1 in the share `rise` of the run, then fall so to `end`.

    Smith and Topin 2017, arXiv:1708.07120. It holds its own warm-up.
    """
    if not 0 < rise < 1:
        raise UserError(f"rise must be between 0 and 1, got {rise}")
    share = min(1.0, step / max(1, total))
    if share < rise:
        return start + (1.0 - start) * (1.0 - math.cos(math.pi * share / rise)) / 2.0
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * (share - rise) / (1.0 - rise))) / 2.0


def swa(
    step: int, total: int, start: int, end: float = 0.05, cycle: int = 0, peak: float = 1.0
) -> float:
    """1 for the first half of `start`, then in a straight line to `end` at nine tenths of it, and there it stays.

    With a `cycle` it falls from `peak` to `end` in each cycle of so many steps from `start` on: what stochastic weight
    averaging explores with (Izmailov et al. 2018, arXiv:1803.05407, sec. 3.1). A constant rate is better for it where
    `end` is high, cycles where one wants each average's weights to be good.
    """
    if start < 1 or cycle < 0:
        raise UserError(f"start is 1 step or more and cycle 0 or more, got {start} and {cycle}")
    if cycle and step >= start:
        share = ((step - start) % cycle + 1) / cycle
        return (1.0 - share) * peak + share * end
    share = min(1.0, max(0.0, (step / start - 0.5) / 0.4))
    return 1.0 + (end - 1.0) * share


def cyclic_cosine(step: int, total: int, cycles: int, end: float = 0.0) -> float:
    """Fall along half a cosine from 1 to `end` in each of `cycles` equal parts of the run (Huang et al. 2017,
    arXiv:1704.00109, eq. 2)."""
    if not 1 <= cycles <= max(1, total):
        raise UserError(f"cycles must be 1 to the {total} steps of the run, got {cycles}")
    ends = cycle_ends(total, cycles)
    cycle = min(cycles - 1, sum(step >= last for last in ends))
    start = ends[cycle - 1] if cycle else 0
    share = min(1.0, (step - start) / max(1, ends[cycle] - start))
    return end + (1.0 - end) * (1.0 + math.cos(math.pi * share)) / 2.0


def cycle_ends(total: int, cycles: int) -> list[int]:
    """After which of `total` steps each of `cycles` equal parts of a run ends: the last at `total`."""
    return [total * (index + 1) // cycles for index in range(cycles)]


def plateau(cuts: int, factor: float = 0.1, patience: int = PATIENCE, end: float = 0.0) -> float:
    """Multiply by `factor` whenever `patience` evaluations have brought no new best, not below `end`."""
    if patience < 1:
        raise UserError(f"patience must be 1 evaluation or more, got {patience}")
    return max(end, positive("factor", factor) ** cuts)


def positive(name: str, value: float) -> float:
    """Return `value` if it is more than 0."""
    if not value > 0:
        raise UserError(f"{name} must be more than 0, got {value}")
    return value
