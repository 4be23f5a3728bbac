"""Eight families in tiny, for the parity grid: what is a model or objective of the house, and what stands here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.data_shards.loader import MicroBatch
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.recipe import Recipe

Logged = tuple[Tensor, dict[str, Tensor]]
LATENT = 6


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Dropout(0.2), nn.Linear(20, 10)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, image: Tensor) -> Tensor:
        states, _ = self.lstm(image.squeeze(1))
        return self.head(states[:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 2 * LATENT)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layers(image).chunk(2, dim=1)
        return mean, log_variance


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LATENT, 24), nn.Tanh(), nn.Linear(24, 64))

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent).view(-1, 1, 8, 8)


class Variational(Objective):
    """Two networks of one player; an evidence bound with unit variance (Kingma and Welling 2014)."""

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> Logged:
        image = micro["image"]
        mean, log_variance = networks.encoder(image)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        reconstruction = ((networks.decoder(latent) - image) ** 2).flatten(1).sum(1) / 2
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        loss = (reconstruction + divergence).mean()
        return loss, {"loss": loss.detach()}


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(LATENT, 8 * 4 * 4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.project(latent).view(-1, 8, 4, 4)
        return torch.tanh(self.up(F.softplus(self.norm(x))))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 8, 4, 2, 1))
        self.down2, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.score = nn.Linear(8 * 4 * 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.softplus(self.down1(image))
        x = F.softplus(self.norm(self.down2(x)))
        return self.score(x.flatten(1)).squeeze(1)


class Adversarial(Objective):
    """Non-saturating, with batch norm in both; the discriminator has two turns a step, the generator one between."""

    players = ("generator", "discriminator")

    def turns(self, step: int) -> list[Turn]:
        return [Turn("discriminator", 0), Turn("generator", 1), Turn("discriminator", 2)]

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> Logged:
        real = micro["image"]
        noise = torch.randn(len(real), LATENT, device=real.device)
        if turn.player == "generator":
            loss = F.softplus(-networks.discriminator(networks.generator(noise))).mean()
            return loss, {"loss": loss.detach()}
        with torch.no_grad():
            fake = networks.generator(noise)
        on_real, on_fake = networks.discriminator(real), networks.discriminator(fake)
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        return loss, {"loss": loss.detach()}


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.InstanceNorm2d(6, affine=True),
            nn.Tanh(),
            nn.Conv2d(6, 1, 3, padding=1),
        )

    def forward(self, image: Tensor) -> Tensor:
        return torch.tanh(self.layers(image))


class Cycle(Objective):
    """Two translators of one player, two critics of another, least squares, cycles, and a pool of earlier fakes.

    The domains are the images and their negatives. The pool of a slot is in `micro.memory` (Zhu et al. 2017).
    """

    players = ("translators", "critics")

    def turns(self, step: int) -> list[Turn]:
        return [Turn("translators", 0), Turn("critics", 1)]

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> Logged:
        a = micro["image"]
        b = -a.flip(3)
        if turn.player == "translators":
            fake_b, fake_a = networks.to_b(a), networks.to_a(b)
            cycle = F.mse_loss(networks.to_a(fake_b), a) + F.mse_loss(networks.to_b(fake_a), b)
            fool = ((networks.of_b(fake_b) - 1) ** 2).mean() + (
                (networks.of_a(fake_a) - 1) ** 2
            ).mean()
            loss = fool + 5 * cycle
            return loss, {"loss": loss.detach()}
        with torch.no_grad():
            fake_b = self._pooled(micro, "b", networks.to_b(a))
            fake_a = self._pooled(micro, "a", networks.to_a(b))
        loss = sum(
            ((critic(real) - 1) ** 2).mean() + (critic(fake) ** 2).mean()
            for critic, real, fake in ((networks.of_a, a, fake_a), (networks.of_b, b, fake_b))
        )
        return loss, {"loss": loss.detach()}  # type: ignore[union-attr,return-value]

    def _pooled(self, micro: MicroBatch, name: str, fake: Tensor) -> Tensor:
        """Of each image the pool's with probability 1/2, which then keeps the new one."""
        pool = micro.memory.get(name, fake)
        swap = torch.rand(len(fake), 1, 1, 1, device=fake.device) < 0.5
        micro.memory[name] = torch.where(swap, fake, pool)
        return torch.where(swap, pool, fake)


def here(name: str) -> dict[str, str]:
    return {"name": f"parity_models:{name}"}


FAMILIES: dict[str, dict[str, Any]] = {
    "MLP": {"model": here("Perceptron"), "objective": {"name": "classification"}},
    "ResNet": {
        "model": {"name": "resnet", "depth": 8, "width": 4, "in_channels": 1, "num_classes": 10},
        "objective": {"name": "classification"},
    },
    "LSTM": {"model": here("Recurrent"), "objective": {"name": "classification"}},
    "Transformer": {
        "model": {
            "name": "transformer",
            "vocab_size": 256,
            "dim": 16,
            "depth": 2,
            "num_heads": 2,
            "max_length": 32,
            "dropout": 0.1,
        },
        "objective": {"name": "language_modelling"},
    },
    "VAE": {
        "model": {"model": {"encoder": here("Encoder"), "decoder": here("Decoder")}},
        "objective": here("Variational"),
    },
    "DCGAN": {
        "model": {"generator": here("Generator"), "discriminator": here("Discriminator")},
        "objective": here("Adversarial"),
    },
    "WGAN-GP": {
        "model": {
            "generator": {
                "name": "conv_generator",
                "latent_dim": 8,
                "width": 8,
                "hidden": 32,
                "image_size": 8,
            },
            "critic": {"name": "conv_critic", "width": 8, "hidden": 16, "image_size": 8},
        },
        "objective": {"name": "wgan_gp", "latent_dim": 8, "critic_steps": 2},
    },
    "CycleGAN-like": {
        "model": {
            "translators": {"to_b": here("Translator"), "to_a": here("Translator")},
            "critics": {"of_a": here("Discriminator"), "of_b": here("Discriminator")},
        },
        "objective": here("Cycle"),
    },
}
CLIPS: dict[str, dict[str, float]] = {"norm": {"norm": 0.2}, "value": {"value": 0.01}, "none": {}}


def family_recipe(family: str, data: Path | str, micro_batches: int, clip: str) -> Recipe:
    """SGD with momentum, so that a rounded gradient stays a rounded step; a global batch of 24."""
    settings: dict[str, Any] = {
        "project": "parity",
        "name": family,
        "seed": 11,
        "duration": "5 steps",
        "strategy": "single",
        "threads": 1,
        "data": {
            "path": str(Path(data) / ("text" if family == "Transformer" else "digits")),
            "global_batch": 24,
            "micro_batch": 24 // micro_batches,
            "scale": "signed",
        },
        "optimizer": {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9, "weight_decay": 1e-3},
        "callbacks": {"clip_gradients": CLIPS[clip]} if CLIPS[clip] else {},
        **FAMILIES[family],
    }
    return Recipe(**settings)
