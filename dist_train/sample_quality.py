"""How good samples are, by the features that a trained classifier sees in them and the classes it takes them for.

Shapes: N real images, M samples, F features, K classes. Rows are an evaluation's: one sample for each real image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.errors import UserError
from dist_train.metrics import Rows, Sums

LEAST_SHARE = 0.2
"""A mode is covered when samples have at least this much of the share that it has among the real."""


def frechet_distance(
    mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor
) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), of means (F,) and covariances (F, F): the squared Wasserstein-2
    distance of the two normal distributions (Heusel et al. 2017, arXiv:1706.08500). In float64."""
    root = _root(covariance.double())
    # the same trace as that of (C C')^(1/2), of a symmetric matrix
    cross = torch.linalg.eigvalsh(root @ other_covariance.double() @ root).clamp(min=0).sqrt().sum()
    spread = covariance.double().trace() + other_covariance.double().trace() - 2 * cross
    return float((mean.double() - other_mean.double()).square().sum() + spread)


def _root(matrix: Tensor) -> Tensor:
    """The square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(real: Tensor, samples: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of samples (M, F) that lie where the real (N, F) are, and of the real that lie where samples are.

    A set is where the balls around its points are, each as large as the distance to its k-th nearest neighbour
    (Kynkaanniemi et al. 2019, arXiv:1904.06991).
    """
    if min(len(real), len(samples)) <= neighbours:
        raise UserError(
            f"neighbours: got {neighbours}, expected fewer than the {min(len(real), len(samples))} points"
        )
    return _share_inside(samples, real, neighbours), _share_inside(real, samples, neighbours)


def _share_inside(points: Tensor, others: Tensor, neighbours: int) -> float:
    """The share of points (M, F) inside the ball of at least one of `others` (N, F)."""
    among = torch.cdist(others.double(), others.double())  # (N, N)
    radius = among.kthvalue(neighbours + 1, dim=1).values  # (N,); the nearest is the point itself
    inside = torch.cdist(points.double(), others.double()) <= radius  # (M, N)
    return float(inside.any(dim=1).double().mean())


def nearest_mode(points: Tensor, centres: Tensor, radius: float) -> Tensor:
    """Which of the centres (K, D) each point (M, D) belongs to: the nearest, or -1 where it is beyond `radius`."""
    distance, mode = torch.cdist(points, centres).min(dim=1)
    return torch.where(distance <= radius, mode, -1)


def covered_modes(counts: Sequence[float], real: Sequence[float]) -> int:
    """How many of the modes that the real have, by how often each came (K,), samples have as well."""
    total, wanted = max(sum(counts), 1.0), max(sum(real), 1.0)
    return sum(
        there > 0 and mine / total >= LEAST_SHARE * there / wanted
        for mine, there in zip(counts, real, strict=True)
    )


class FrechetDistance:
    """The Frechet distance of the samples' features from those of the real, by sums over any number of ranks."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Sums:
        parts = [torch.tensor([float(micro.real)], dtype=torch.float64)]
        for name in ("real_features", "features"):
            x = judged(outputs, name)[: micro.real].double()  # (b, F)
            parts = [part.to(x.device) for part in parts] + [x.sum(0), (x.T @ x).flatten()]
        return Sums(torch.cat(parts))

    def finish(self, sums: list[float]) -> float:
        count, values = sums[0], torch.tensor(sums[1:], dtype=torch.float64)
        if count < 2:
            raise UserError(f"frechet_distance: needs 2 samples or more, got {count:g}")
        features = round((1 + 2 * len(values)) ** 0.5 - 1) // 2  # 2 (F + F^2) sums
        moments = []
        for one in values.view(2, -1):
            mean = one[:features] / count
            square = one[features:].view(features, features)
            moments += [mean, (square - count * mean.outer(mean)) / (count - 1)]
        return frechet_distance(*moments)


class CoveredModes:
    """How many classes of the real there are among the samples, as a classifier sees both."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Sums:
        found = [judged(outputs, name)[: micro.real] for name in ("class", "real_class")]
        return Sums(torch.cat([class_counts(one) for one in found]))

    def finish(self, sums: list[float]) -> float:
        half = len(sums) // 2
        return float(covered_modes(sums[:half], sums[half:]))


MOST_CLASSES = 1024
"""So many counts a metric adds up, as it does not know the number of classes."""


def class_counts(found: Tensor) -> Tensor:
    """How often each class came: (1024,) float64. UserError for a class beyond."""
    counts = torch.bincount(found, minlength=MOST_CLASSES)
    if len(counts) > MOST_CLASSES:
        raise UserError(
            f"objective.judge: takes a picture for class {len(counts) - 1}, but modes are counted up to {MOST_CLASSES}"
        )
    return counts.double()


def label_agreement(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """Whether the classifier takes a conditional sample for the class that it was to be: (b,)."""
    return (judged(outputs, "class") == micro["label"]).double()


def judged(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    """What an evaluation with a judge gave. UserError where there was none."""
    if name not in outputs:
        raise UserError(
            f"evaluate.metrics: the evaluation has no '{name}', expected objective.judge, a classifier's run"
        )
    return outputs[name]


def paired_l1(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """Mean difference of a translated image from its pair, in [0, 1]: (b,)."""
    return outputs["paired_l1"]


def paired_l1_back(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """The same of the way back: (b,)."""
    return outputs["paired_l1_back"]


def identity_l1(outputs: Mapping[str, Tensor], micro: Rows) -> Any:
    """Mean difference of an image from its pair, as they are: (b,)."""
    return outputs["identity_l1"]
