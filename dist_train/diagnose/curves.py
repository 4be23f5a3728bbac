"""What a run's curves say is wrong with it, and the remedy: pure functions of the rows of metrics.jsonl.

Thresholds are rules of thumb on smoothed curves: a finding is a hint where to look, not a proof. `BLOCK` rows are
averaged before anything is compared, so that the noise of mini-batches is not taken for a trend.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
Curve = list[tuple[float, float]]

FEWEST = 12
"""Rows with a loss, below which its trend is not judged."""
BLOCKS = 8
"""A curve is judged by the means of so many pieces of equal length."""
LEAST_KL = 0.1
"""Nats a sample, below which the code of a VAE tells nothing."""
MOST_PRIOR_GAP = 0.5
"""Nats a latent number between the codes of all samples together and the prior (`objectives.elbo.prior_gap`)."""


@dataclass(frozen=True)
class Finding:
    """`name` is a key for programs, `text` what the curves show, `remedy` what the course advises."""

    name: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}"


def diagnose(rows: Rows) -> list[Finding]:
    """All findings on the run of one player; of several players' losses, which need not fall, only the gradients."""
    return [finding for check in CHECKS if (finding := check(rows)) is not None]


def overfitting(rows: Rows) -> Finding | None:
    """The evaluation loss rises, or stays far above the training loss, while the training loss goes on falling."""
    training, evaluation = curve(rows, "loss"), curve(rows, "evaluate/loss")
    if len(evaluation) < 3 or len(training) < 2:
        return None
    step, lowest = min(evaluation, key=lambda point: point[1])
    end = evaluation[-1][1]
    before = [value for at, value in training if at <= step]
    after = [value for at, value in training if at > step]
    falls = bool(before and after) and _end(after) < _end(before)
    remedy = (
        "Stop earlier (early_stopping), take more data or augment what there is, regularise more "
        "(weight_decay, dropout), or take a smaller model."
    )
    if falls and end > lowest + 0.02 * abs(lowest):
        return Finding(
            "over-fitting",
            f"Over-fitting since step {step:,.0f}: the evaluation loss rose from {number(lowest)} to {number(end)} "
            "while the training loss went on falling.",
            remedy,
        )
    last = _end([value for _, value in training])
    if last > 0 and end > 3 * last and last < 0.5 * training[0][1]:
        return Finding(
            "over-fitting",
            f"Over-fitting: at the end the evaluation loss, {number(end)}, is {end / last:.1f} times the "
            "training loss.",
            remedy,
        )
    return None


def underfitting(rows: Rows) -> Finding | None:
    """The training loss has stopped high, and evaluation is no worse: the model cannot, or may not, fit the data. A VAE
    is not judged: a bound on the likelihood does not go to 0."""
    blocks, evaluation = _blocks(rows), curve(rows, "evaluate/loss")
    if not blocks or not evaluation or blocks[0] <= 0 or curve(rows, "kl"):
        return None
    end, gap = blocks[-1], evaluation[-1][1] / blocks[-1] if blocks[-1] > 0 else math.inf
    if _flat(blocks) and end > 0.5 * blocks[0] and gap < 1.1:
        return Finding(
            "under-fitting",
            f"Under-fitting: the training loss stopped at {number(end)}, {end / blocks[0]:.0%} of its first value, "
            "and the evaluation loss is no higher.",
            "Take a larger or deeper model, regularise less, or see whether the inputs tell enough.",
        )
    return None


def rate_too_high(rows: Rows) -> Finding | None:
    """The loss is not finite, ends above where it began, or jumps about more than it falls."""
    remedy = "Lower the learning rate by 3 to 10, warm it up, or clip the gradients."
    bad = next((row for row in rows if "loss/nonfinite" in row), None)
    if bad is not None:
        text = f"The learning rate is too high: the loss was {bad['loss/nonfinite']} at step {bad['step']:,}."
        return Finding("rate too high", text, remedy)
    values = [value for _, value in curve(rows, "loss")]
    if len(values) < FEWEST:
        return None
    blocks = _blocks(rows)
    first, last = statistics.mean(values[: max(1, len(values) // 20)]), blocks[-1]
    if last > first + 0.05 * abs(first):
        text = (
            f"The learning rate is too high: the loss rose from {number(first)} to {number(last)}."
        )
        return Finding("rate too high", text, remedy)
    late = values[len(values) // 2 :]
    jumps = [abs(b - a) for a, b in itertools.pairwise(late)]
    swing = statistics.median(jumps) if jumps else 0.0
    if swing > 0.5 * abs(first - last) and swing > 0.1 * abs(last):
        text = (
            f"The learning rate is probably too high: from one row to the next the loss jumps by {number(swing)}, "
            f"and it fell by {number(first - last)} in all."
        )
        return Finding(
            "rate too high", text, f"{remedy} If it is the noise of few samples: a larger batch."
        )
    return None


def rate_too_low(rows: Rows) -> Finding | None:
    """The loss falls as slowly and as steadily at the end as at the beginning, and has not come far."""
    blocks = _blocks(rows)
    if not blocks or blocks[0] <= 0:
        return None
    falls = [a - b for a, b in itertools.pairwise(blocks)]
    total = blocks[0] - blocks[-1]
    early, late = sum(falls[:3]), sum(falls[-3:])
    steady = all(fall > 0 for fall in falls) and late > 0.5 * early
    if steady and 0 < total < 0.3 * blocks[0]:
        return Finding(
            "rate too low",
            f"The learning rate is too low: the loss fell by only {total / blocks[0]:.0%}, as steadily at the end "
            "as at the beginning.",
            "Raise it by 3 to 10 (`dist-train diagnose learning-rate` finds where it begins to hurt), or train longer.",
        )
    return None


def plateau(rows: Rows) -> Finding | None:
    """The loss fell and then stood still for half of the run, not near 0, at a learning rate that did not fall."""
    blocks = _blocks(rows)
    rates = [value for _, value in curve(rows, "learning_rate")]
    if not blocks or not rates:
        return None
    fell = blocks[0] - min(blocks)
    still = max(blocks[BLOCKS // 2 :]) - min(blocks[BLOCKS // 2 :])
    done = abs(blocks[-1]) < 0.02 * abs(blocks[0])
    constant = rates[-1] > 0.5 * max(rates)
    if fell > 0.1 * abs(blocks[0]) and still < 0.03 * fell and constant and not done:
        return Finding(
            "plateau",
            f"A plateau: the loss has stood at {number(blocks[-1])} for half of the run, at a constant learning rate.",
            "Decay the learning rate (learning_rate_decay: step, cosine, or plateau), or take momentum or Adam.",
        )
    return None


def exploding_gradients(rows: Rows) -> Finding | None:
    """A norm of the gradients that is not finite, or a hundred times its median."""
    names = dict.fromkeys(
        name.removesuffix("/nonfinite")
        for row in rows
        for name in row
        if name.removesuffix("/nonfinite").rpartition("/")[2] == "gradient_norm"
    )
    for name in names:
        norms = curve(rows, name)
        middle = statistics.median([norm for _, norm in norms]) if norms else 0.0
        bad = next((row for row in rows if f"{name}/nonfinite" in row), None)
        step, worst = max(norms, key=lambda point: point[1], default=(0.0, 0.0))
        if bad is not None or (len(norms) >= 5 and worst > 100 * middle > 0):
            what = (
                f"the {name.replace('_', ' ')} was {bad[f'{name}/nonfinite']} at step {bad['step']:,}"
                if bad is not None
                else f"the {name.replace('_', ' ')} reached {number(worst)} at step {step:,.0f}, "
                f"{worst / middle:,.0f} times its median"
            )
            advice = (
                f" (clip_gradients: {{norm: {number(2 * middle)}}} spares most steps)"
                if middle
                else ""
            )
            return Finding(
                "exploding gradients",
                f"Exploding gradients: {what}.",
                f"Clip them by norm{advice}, lower the learning rate, or normalise and initialise the layers.",
            )
    return None


def dead_units(rows: Rows) -> Finding | None:
    """Units that no gradient reaches, as the callback `dead_units` counts them."""
    shares = curve(rows, "dead_units")
    if not shares or shares[-1][1] < 0.2:
        return None
    return Finding(
        "dead units",
        f"Dead units: in the worst layer {shares[-1][1]:.0%} of the units got no gradient from a whole batch.",
        "Lower the learning rate, initialise with he, or take leaky_relu or a norm before the activation.",
    )


def divergence_too_low(rows: Rows) -> Finding | None:
    """A VAE's code tells nothing of a sample: the decoder ignores it (posterior collapse)."""
    divergences = [value for _, value in curve(rows, "kl")]
    if len(divergences) < FEWEST or _end(divergences) >= LEAST_KL:
        return None
    return Finding(
        "KL too low",
        f"KL too low, the code is ignored: at the end it tells {number(_end(divergences))} nats of a sample.",
        "Lower beta, or let it rise from 0 (schedule: {scalar: beta, value: 1, schedule: constant, warmup: ...}); take"
        " a decoder that can do less without the code, or a smaller variance of its likelihood.",
    )


def divergence_too_high(rows: Rows) -> Finding | None:
    """A VAE's codes lie elsewhere than the prior: what is drawn from it, the decoder has never seen."""
    gaps = [value for _, value in curve(rows, "prior_gap")]
    if len(gaps) < FEWEST or _end(gaps) <= MOST_PRIOR_GAP:
        return None
    return Finding(
        "KL too high",
        f"KL too high, the prior is not matched: all codes together are {number(_end(gaps))} nats a latent number from "
        "it, so samples drawn from it are of what the decoder never saw.",
        "Raise beta, take fewer latent numbers, or a larger variance of the likelihood.",
    )


CHECKS: tuple[Callable[[Rows], Finding | None], ...] = (
    rate_too_high,
    exploding_gradients,
    rate_too_low,
    plateau,
    underfitting,
    overfitting,
    dead_units,
    divergence_too_low,
    divergence_too_high,
)


def curve(rows: Rows, name: str) -> Curve:
    """(step, value) of a figure, where it is a finite number."""
    return [
        (row["step"], float(row[name]))
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def number(value: float) -> str:
    """As the report writes it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _blocks(rows: Rows) -> list[float]:
    """The means of BLOCKS pieces of the training loss; none when there are too few rows."""
    values = [value for _, value in curve(rows, "loss")]
    if len(values) < FEWEST:
        return []
    edges = [round(i * len(values) / BLOCKS) for i in range(BLOCKS + 1)]
    return [statistics.mean(values[a:b]) for a, b in itertools.pairwise(edges)]


def _flat(blocks: Sequence[float]) -> bool:
    """Whether the last quarter changes by less than 2 %."""
    return abs(blocks[-1] - blocks[-3]) < 0.02 * abs(blocks[-3])


def _end(values: Sequence[float]) -> float:
    """The mean of the last twentieth."""
    return statistics.mean(values[-max(1, len(values) // 20) :])
