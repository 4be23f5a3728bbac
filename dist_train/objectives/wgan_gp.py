"""Wasserstein GAN with gradient penalty (Gulrajani et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn


class WassersteinGradientPenalty(Objective):
    """The critic's turn every step, the generator's every `critic_steps`-th (algorithm 1 of the paper).

    `generator(z (B, latent_dim)) -> image (B, C, H, W) in [-1, 1]`, `critic(image) -> score (B,)`. The critic's loss is
    mean D(fake) - mean D(real) + penalty * mean (|grad D(x)| - 1)^2 at points x between real and fake (eq. 3): its
    gradient needs a double backward, so it is given.
    """

    players = ("generator", "critic")
    given = frozenset({"critic"})

    def __init__(self, latent_dim: int = 64, penalty: float = 10.0, critic_steps: int = 5) -> None:
        self.latent_dim, self.penalty, self.critic_steps = latent_dim, penalty, critic_steps

    def turns(self, step: int) -> list[Turn]:
        critic = [Turn("critic", 0)]
        return [*critic, Turn("generator", 1)] if (step + 1) % self.critic_steps == 0 else critic

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real = micro["image"]
        noise = torch.randn(len(real), self.latent_dim, device=real.device)
        if turn.player == "generator":
            loss = -networks.critic(networks.generator(noise)).mean()
            return loss, {"loss": loss.detach()}
        with torch.no_grad():
            fake = networks.generator(noise)
        between = torch.rand(len(real), 1, 1, 1, device=real.device)
        point = (between * real + (1 - between) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(networks.critic(point).sum(), point, create_graph=True)
        penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
        distance = networks.critic(real).mean() - networks.critic(fake).mean()
        loss = self.penalty * penalty - distance
        return loss, {
            "loss": loss.detach(),
            "distance": distance.detach(),
            "gradient_penalty": penalty.detach(),
        }

    def samples(self, networks: Networks, count: int, device: str) -> dict[str, Tensor]:
        noise = torch.randn(count, self.latent_dim, device=device)
        return {"generator": (networks.generator(noise) + 1) / 2}
