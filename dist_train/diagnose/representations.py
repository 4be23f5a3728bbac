"""What a network's layers hold (F13): the rank of a matrix, how alike samples and layers are, when modes are learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values (k,), taken as shares of their sum (Roy and Vetterli 2007): k where all
    are equal, 1 where one is left, 0 of a matrix of zeros."""
    total = singular_values.sum()
    if total == 0:
        return 0.0
    shares = singular_values / total
    return float(torch.special.entr(shares).sum().exp())


def similarity(x: Tensor) -> Tensor:
    """How alike a layer represents any two of its samples (B, F): the correlations (B, B) of their features, the
    representational similarity matrix of Kriegeskorte et al. 2008. 0 for a sample whose features are all the same."""
    centred = x - x.mean(dim=1, keepdim=True)
    return torch.nn.functional.normalize(centred) @ torch.nn.functional.normalize(centred).T


def cka(x: Tensor, y: Tensor) -> float:
    """How alike two layers (B, F) and (B, G) represent the same samples: |X'Y|^2 / (|X'X| |Y'Y|) of the centred
    features (linear CKA, Kornblith et al. 2019, arXiv:1905.00414). 1 for the same up to rotation and scale."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    # |X'Y|^2 = tr(XX' YY'), and B is small where F is not
    gram_x, gram_y = x @ x.T, y @ y.T
    scale = gram_x.norm() * gram_y.norm()
    return float((gram_x * gram_y).sum() / scale) if scale > 0 else 0.0


def mode_strengths(x: Tensor, y: Tensor) -> Tensor:
    """The singular values of the covariance of inputs (N, F) and standardised targets (N, K): what a linear network
    learns of each mode, where the mean of x x' is 1."""
    deviation = y.std(dim=0, correction=0)
    y = (y - y.mean(dim=0)) / torch.where(deviation > 0, deviation, 1.0)
    return torch.linalg.svdvals(y.T @ x / len(x))


def mode_times(strengths: Tensor, start: float, time_constant: float) -> Tensor:
    """When gradient descent on a linear network of two layers has learnt half of each mode (Saxe et al. 2013,
    arXiv:1312.6120, eq. 12): t = T / (2 s) log((s - a) / a), in the unit of T.

    `strengths` are those of `mode_strengths`; a is what the network has of a mode at the start, H sigma^2 / 2 for H
    hidden units and Gaussian weights. T is the inverse of the rate of descent on half the squared error: K / (2 rate)
    steps for a mean over K outputs.
    """
    return time_constant / (2 * strengths) * ((strengths - start) / start).log()


def half_times(
    steps: Sequence[float], strengths: Sequence[Sequence[float]], ends: Sequence[float]
) -> list[float]:
    """When each mode of `strengths` (a row a step) first reaches half of its end, between two steps by a line; nan
    where it never does."""
    found = []
    for mode, end in enumerate(ends):
        half, reached = end / 2, math.nan
        values = [row[mode] for row in strengths]
        for i in range(1, len(values)):
            if values[i - 1] < half <= values[i]:
                share = (half - values[i - 1]) / (values[i] - values[i - 1])
                reached = steps[i - 1] + share * (steps[i] - steps[i - 1])
                break
        found.append(reached)
    return found
