"""Two players: a generator of images, and an opponent that scores them; what every such objective has in common.

The losses are those of one micro-batch's scores, whose sigmoid is the probability of "real" (Goodfellow et al. 2014,
arXiv:1406.2661, and those named beside the rows).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.objectives import Objective
from dist_train.objectives.judge import Judge


def cross_entropy_of_both(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)): at its least, -2 log 2 off, it is -2 times the Jensen-Shannon divergence."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def squares_of_both(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares to 1 and to 0 (Mao et al. 2017, arXiv:1611.04076, eq. 9)."""
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


def minus_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Minus the Wasserstein distance that a 1-Lipschitz critic sees (Arjovsky et al. 2017, arXiv:1701.07875)."""
    return fake.mean() - real.mean()


def hinge_of_both(real: Tensor, fake: Tensor) -> Tensor:
    """A margin of 1 on both sides (Lim and Ye 2017, arXiv:1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


Losses = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]
LOSSES: dict[str, Losses] = {
    "minimax": (cross_entropy_of_both, lambda fake: -F.softplus(fake).mean()),  # log(1 - D)
    "non_saturating": (cross_entropy_of_both, lambda fake: F.softplus(-fake).mean()),  # -log D
    "least_squares": (squares_of_both, lambda fake: 0.5 * (fake - 1).square().mean()),
    "wasserstein": (minus_distance, lambda fake: -fake.mean()),
    "hinge": (hinge_of_both, lambda fake: -fake.mean()),
}
"""What the opponent minimises of its scores for real and fake, and the generator of those for its own."""


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, between: Tensor
) -> Tensor:
    """mean (|grad D(x)| - 1)^2 at x = between real + (1 - between) fake (Gulrajani et al. 2017, arXiv:1704.00028).

    Args:
        between: (B, 1, ...) in [0, 1]. Its gradient needs a double backward.
    """
    point = (between * real + (1 - between) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class Adversarial(Objective, ABC):
    """`generator(z (B, latent_dim)) -> image (B, C, S, S) in [-1, 1]`, and an opponent `(image) -> score (B,)`.

    With classes both are given the label too, `generator(z, label)`: fakes are asked for the classes of the real.

    An evaluation draws a sample for each real image. With a judge it gives the features that this classifier sees in
    both, (B, F), and the class that it takes the sample for, (B,).

    Args:
        num_classes: 0 for a network without labels.
        judge: the run directory of a classifier; from the recipe's project root on.
    """

    scale = "signed"

    def __init__(
        self,
        latent_dim: int = 64,
        num_classes: int = 0,
        judge: str | None = None,
        root: Path | None = None,
    ) -> None:
        if latent_dim < 1:
            raise UserError(f"latent_dim: got {latent_dim}, expected 1 or more")
        if num_classes < 0:
            raise UserError(f"num_classes: got {num_classes}, expected 0 (no labels) or more")
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self._judge = Judge((root or Path.cwd()) / Path(judge).expanduser()) if judge else None

    def _label(self, micro: MicroBatch) -> tuple[Tensor, ...]:
        """What networks are given beside z or x."""
        return (micro["label"],) if self.num_classes else ()

    def _fake(self, networks: Networks, like: Tensor, label: tuple[Tensor, ...]) -> Tensor:
        """As many images as `like` (B, ...) has rows."""
        return networks.generator(self._noise(like), *label)

    def _noise(self, like: Tensor) -> Tensor:
        """z (B, latent_dim) for `like` (B, ...)."""
        return torch.randn(len(like), self.latent_dim, device=like.device)

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        fake = self._fake(networks, micro["image"], self._label(micro))
        if self._judge is None:
            return {"generated": fake}
        real_features, real_class = self._judge((micro["image"] + 1) / 2)
        features, found = self._judge((fake + 1) / 2)
        return {
            "generated": fake,
            "real_features": real_features,
            "real_class": real_class,
            "features": features,
            "class": found,
        }

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        rows = torch.arange(count, device=device)
        label = (rows % self.num_classes,) if self.num_classes else ()
        return {"generator": (self._fake(networks, rows, label) + 1) / 2}
