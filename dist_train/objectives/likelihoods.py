"""What a decoder's numbers say of x: log-likelihoods of each element in nats, in stable forms.

Shapes: numbers (B, P, ...), x (B, ...); discrete ones are of the 256 levels of x = level / 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
LEAST_LOG_SCALE = -8.3
"""Of a discretised logistic: at it, the level at its mean has all the mass to 1e-3 already."""


@dataclass(frozen=True)
class Likelihood:
    """`per_element` numbers an element; `log_probability(numbers, x, variance)` and the `mean` of x, both (B, ...).

    Of a `discrete` one the log-likelihood is that of a level: its bits are what a code would take.
    """

    per_element: int
    log_probability: Callable[[Tensor, Tensor, float], Tensor]
    mean: Callable[[Tensor], Tensor]
    discrete: bool = False


def gaussian(numbers: Tensor, x: Tensor, variance: float) -> Tensor:
    """N(x; mean, variance), the same variance for all."""
    (mean,) = numbers.unbind(1)
    return -0.5 * (math.log(2 * math.pi * variance) + (x - mean).square() / variance)


def gaussian_predicted(numbers: Tensor, x: Tensor, variance: float) -> Tensor:
    """N(x; mean, v) with v = variance + exp(the second number): a pixel that is always 0 would else have density
    without bounds."""
    mean, log_excess = numbers.unbind(1)
    v = variance + log_excess.exp()
    return -0.5 * ((2 * math.pi * v).log() + (x - mean).square() / v)


def bernoulli(numbers: Tensor, x: Tensor, variance: float) -> Tensor:
    """x log p + (1 - x) log(1 - p) of the logit; for x in [0, 1], a probability mass where x is 0 or 1."""
    (logit,) = numbers.unbind(1)
    return x * logit - F.softplus(logit)


def categorical(numbers: Tensor, x: Tensor, variance: float) -> Tensor:
    """A softmax over the levels."""
    return numbers.log_softmax(1).gather(1, level_of(x)[:, None]).squeeze(1)


def discretised_logistic(numbers: Tensor, x: Tensor, variance: float) -> Tensor:
    """The mass of a logistic between the middles of two levels, all that is beyond in the first and the last
    (Kingma et al. 2016, arXiv:1606.04934).

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), of which no factor is a difference.
    """
    mean, log_scale = numbers.unbind(1)
    log_scale = log_scale.clamp(min=LEAST_LOG_SCALE)
    level, width = level_of(x), 1 / (LEVELS - 1)
    a, b = ((x - mean + side * width / 2) * (-log_scale).exp() for side in (1, -1))
    inside = torch.log(-torch.expm1(-width * (-log_scale).exp()))
    below, above = F.logsigmoid(a), F.logsigmoid(-b)
    within = below + above + inside
    return torch.where(level == 0, below, torch.where(level == LEVELS - 1, above, within))


def level_of(x: Tensor) -> Tensor:
    """[0, 1] -> 0 ... 255, int64."""
    return (x * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1)


def expected_level(numbers: Tensor) -> Tensor:
    levels = torch.linspace(0, 1, LEVELS, device=numbers.device, dtype=numbers.dtype)
    return torch.einsum("bp...,p->b...", numbers.softmax(1), levels)


def first(numbers: Tensor) -> Tensor:
    return numbers[:, 0]


LIKELIHOODS: dict[str, Likelihood] = {
    "gaussian": Likelihood(1, gaussian, first),
    "gaussian_predicted": Likelihood(2, gaussian_predicted, first),
    "bernoulli": Likelihood(1, bernoulli, lambda numbers: first(numbers).sigmoid()),
    "categorical": Likelihood(LEVELS, categorical, expected_level, discrete=True),
    "discretised_logistic": Likelihood(2, discretised_logistic, first, discrete=True),
}
