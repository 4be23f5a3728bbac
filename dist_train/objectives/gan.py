"""Generative adversarial network, by any of its losses (Goodfellow et al. 2014, arXiv:1406.2661)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError, nearest
from dist_train.networks import Networks
from dist_train.objectives import Turn
from dist_train.objectives.adversarial import LOSSES, Adversarial


class GAN(Adversarial):
    """The discriminator's turn every step, the generator's every `discriminator_steps`-th.

    With `instance_noise` among the scheduled scalars, normal noise of that deviation is added to all that the
    discriminator sees (Sonderby et al. 2017, arXiv:1610.04490). WGAN's weights are clipped by `callbacks.clip_weights`.

    Args:
        loss: minimax, non_saturating, least_squares, wasserstein or hinge.
        orthogonal: the generator also minimises this times the orthogonal term of its weights (Brock et al. 2019,
            arXiv:1809.11096, eq. 3), which `generator(z, label, True)` gives beside the image (0-d). The shares of the
            micro-batches add up to 1, so it acts once a turn, on any number of ranks.
        latent_dim, num_classes, judge: see `Adversarial`.
    """

    players = ("generator", "discriminator")

    def __init__(
        self,
        loss: str = "non_saturating",
        latent_dim: int = 64,
        discriminator_steps: int = 1,
        orthogonal: float = 0.0,
        num_classes: int = 0,
        judge: str | None = None,
        root: Path | None = None,
    ) -> None:
        super().__init__(latent_dim, num_classes, judge, root)
        if loss not in LOSSES:
            raise UserError(
                f"loss: got '{loss}', expected one of {', '.join(LOSSES)}{nearest(loss, LOSSES)}"
            )
        if discriminator_steps < 1:
            raise UserError(f"discriminator_steps: got {discriminator_steps}, expected 1 or more")
        if orthogonal < 0:
            raise UserError(f"orthogonal: got {orthogonal}, expected 0 (none) or more")
        self.orthogonal = orthogonal
        self.discriminator_steps = discriminator_steps
        self._of_both, self._of_fake = LOSSES[loss]

    def turns(self, step: int) -> list[Turn]:
        both = (step + 1) % self.discriminator_steps == 0
        return [Turn("discriminator", 0), *([Turn("generator", 1)] if both else [])]

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real, label = micro["image"], self._label(micro)
        noise = scalars.get("instance_noise", 0.0)
        if turn.player == "generator":
            return self._generator(networks, real, label, noise)
        with torch.no_grad():
            fake = self._fake(networks, real, label)
        on_real = networks.discriminator(_noisy(real, noise), *label)
        on_fake = networks.discriminator(_noisy(fake, noise), *label)
        loss = self._of_both(on_real, on_fake)
        return loss, {
            "loss": loss.detach(),
            "score_real": on_real.detach().mean(),
            "score_fake": on_fake.detach().mean(),
        }

    def _generator(
        self, networks: Networks, real: Tensor, label: tuple[Tensor, ...], noise: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.orthogonal:
            fake = self._fake(networks, real, label)
            loss = self._of_fake(networks.discriminator(_noisy(fake, noise), *label))
            return loss, {"loss": loss.detach()}
        fake, term = self._fake_with_term(networks, real, label)
        loss = self._of_fake(networks.discriminator(_noisy(fake, noise), *label))
        loss = loss + self.orthogonal * term
        return loss, {"loss": loss.detach(), "orthogonal": term.detach()}

    def _fake_with_term(
        self, networks: Networks, like: Tensor, label: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        try:
            return networks.generator(self._noise(like), *(label or (None,)), True)
        except TypeError as error:
            raise UserError(
                "objective.orthogonal: asks for generator(z, label, True) -> image and term, which failed:"
                f" {error}; leave orthogonal out for a generator that gives the image alone"
            ) from error


def _noisy(image: Tensor, deviation: float) -> Tensor:
    return image + deviation * torch.randn_like(image) if deviation else image
