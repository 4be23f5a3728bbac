"""Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.networks import Networks
from dist_train.objectives import Turn
from dist_train.objectives.adversarial import Adversarial, gradient_penalty, minus_distance


class WassersteinGradientPenalty(Adversarial):
    """The critic's turn every step, the generator's every `critic_steps`-th (algorithm 1 of the paper).

    The critic's loss is mean D(fake) - mean D(real) + penalty * mean (|grad D(x)| - 1)^2 at points x between real and
    fake (eq. 3): its gradient needs a double backward, so it is given.

    Args:
        latent_dim, num_classes, judge: see `Adversarial`.
    """

    players = ("generator", "critic")
    given = frozenset({"critic"})

    def __init__(
        self,
        latent_dim: int = 64,
        penalty: float = 10.0,
        critic_steps: int = 5,
        num_classes: int = 0,
        judge: str | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__(latent_dim, num_classes, judge, root)
        self.penalty, self.critic_steps = penalty, critic_steps

    def turns(self, step: int) -> list[Turn]:
        critic = [Turn("critic", 0)]
        return [*critic, Turn("generator", 1)] if (step + 1) % self.critic_steps == 0 else critic

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real, label = micro["image"], self._label(micro)
        if turn.player == "generator":
            loss = -networks.critic(self._fake(networks, real, label), *label).mean()
            return loss, {"loss": loss.detach()}
        with torch.no_grad():
            fake = self._fake(networks, real, label)
        between = torch.rand(len(real), 1, 1, 1, device=real.device)
        penalty = gradient_penalty(lambda x: networks.critic(x, *label), real, fake, between)
        minus = minus_distance(networks.critic(real, *label), networks.critic(fake, *label))
        loss = self.penalty * penalty + minus
        return loss, {
            "loss": loss.detach(),
            "distance": -minus.detach(),
            "gradient_penalty": penalty.detach(),
        }
