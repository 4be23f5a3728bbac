"""What the members of an ensemble say together: pure functions of their outputs.

Shapes: M members, B rows, K classes, D numbers a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dist_train.errors import UserError, nearest

WAYS = ("mean", "vote")
TIE = 1e-9
"""What the mean probability weighs beside a vote: enough to decide between classes of equally many votes."""


def check_way(how: str) -> str:
    """Return `how` if members can be combined so."""
    if how not in WAYS:
        raise UserError(f"how: got '{how}', expected one of {', '.join(WAYS)}{nearest(how, WAYS)}")
    return how


def log_mean_probability(log_probability: Tensor) -> Tensor:
    """log (1/M) sum_m p_m: (M, B, K) -> (B, K). A log-probability of one class, (M, B) -> (B,), likewise."""
    return log_probability.logsumexp(dim=0) - math.log(len(log_probability))


def log_vote(log_probability: Tensor) -> Tensor:
    """The log of each class's share of the members' votes: (M, B, K) -> (B, K) float64, -inf for a class without any.

    Where classes have equally many votes the mean probability decides, which `argmax` then sees.
    """
    members, classes = len(log_probability), log_probability.shape[-1]
    chosen = log_probability.argmax(dim=-1)  # (M, B)
    votes = torch.nn.functional.one_hot(chosen, classes).sum(dim=0)  # (B, K)
    shares = votes.double() / members
    ties = TIE * log_mean_probability(log_probability.double()).exp()
    return torch.where(shares > 0, (shares + ties).log(), -math.inf)


def combined_log_probability(log_probability: Tensor, how: str) -> Tensor:
    """(M, B, K) -> (B, K), by one of WAYS."""
    functions = {"mean": log_mean_probability, "vote": log_vote}
    return functions[check_way(how)](log_probability)


def mixture_moments(mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a mixture of M distributions in equal parts: (M, B, D) each -> (B, D) each.

    Its variance is the members' mean variance and the variance of their means (Lakshminarayanan et al. 2017,
    arXiv:1612.01474, sec. 2.4).
    """
    together = mean.mean(dim=0)
    variance = deviation.square().mean(dim=0) + (mean - together).square().mean(dim=0)
    return together, variance.sqrt()


def disagreement(classes: Tensor) -> float:
    """How often two of the members name different classes: (M, B) -> the mean over pairs of members and rows."""
    members = len(classes)
    pairs = [(a, b) for a in range(members) for b in range(a)]
    return sum(float((classes[a] != classes[b]).double().mean()) for a, b in pairs) / len(pairs)


def ambiguity(prediction: Tensor) -> float:
    """How far members are from their mean: (M, B, D) -> the mean square.

    By it the mean prediction's squared error is less than the members' own is on average (Krogh and Vedelsby 1995).
    """
    return float((prediction - prediction.mean(dim=0)).square().mean())


def reliability(probability: Tensor, label: Tensor, bins: int = 15) -> list[dict[str, Any]]:
    """The reliability diagram (Guo et al. 2017, arXiv:1706.04599): for bins of equal width of the confidence, how many
    rows fall into each, their mean confidence, and how many of them are right. (B, K), (B,).

    The expected calibration error is the mean |confidence - accuracy| over the rows. A bin without rows has None.
    """
    confidence, chosen = probability.double().max(dim=-1)
    right = (chosen == label).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    rows = []
    for index in range(bins):
        inside = place == index
        count = int(inside.sum())
        rows.append(
            {
                "from": index / bins,
                "to": (index + 1) / bins,
                "count": count,
                "confidence": float(confidence[inside].mean()) if count else None,
                "accuracy": float(right[inside].mean()) if count else None,
            }
        )
    return rows
