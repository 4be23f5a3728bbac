"""Convolutional generator and critic for Wasserstein GANs (Gulrajani et al. 2017, arXiv:1704.00028).

Shapes: B images, Z latent numbers, C channels, S x S pixels, w width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.2
"""Of the leaky ReLUs, as DCGAN (Radford et al. 2016, arXiv:1511.06434)."""


class ConvGenerator(nn.Module):
    """Latent numbers -> image in [-1, 1]: a linear layer to S/4 x S/4, then two upsamplings by 2."""

    def __init__(
        self,
        latent_dim: int = 64,
        width: int = 32,
        channels: int = 1,
        image_size: int = 28,
        norm: str = "none",
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.base = (2 * width, image_size // 4, image_size // 4)
        self.project = nn.Linear(latent_dim, 2 * width * (image_size // 4) ** 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        mk = {"none": lambda c: nn.Identity(), "bn": nn.BatchNorm2d}[norm]
        self.n0, self.n1 = mk(2 * width), mk(width)
        initialise(self)

    def forward(self, latent: Tensor) -> Tensor:
        x = F.relu(self.n0(self.project(latent).view(-1, *self.base)))
        x = F.relu(self.n1(self.up1(x)))
        return self.up2(x).tanh()


class ConvCritic(nn.Module):
    def __init__(self, width: int = 32, channels: int = 1, image_size: int = 28) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.score = nn.Linear(2 * width * (image_size // 4) ** 2, 1)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.down1(image), SLOPE)
        x = F.leaky_relu(self.down2(x), SLOPE)
        return self.score(x.flatten(1)).squeeze(1)


def initialise(model):
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.zeros_(m.bias)
