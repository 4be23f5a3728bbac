"""Deep convolutional GAN (Radford et al. 2016, arXiv:1511.06434), conditional where there are classes.

The discriminator's layers may be spectrally normalised instead (Miyato et al. 2018, arXiv:1802.05957): each weight, as
a matrix (out, rest), is divided by its largest singular value, which one step of power iteration a forward follows.
Shapes: B images, Z latent numbers, K classes, C channels, S x S pixels, w width, n halvings from S to s pixels.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from dist_train.models.gan import SLOPE, initialise
from dist_train.models.gan_mlp import joined
from dist_train.models.layers import chosen

DISCRIMINATOR_NORMS = {"batch": nn.BatchNorm2d, "spectral": nn.Identity, "none": nn.Identity}
"""What stands after its convolutions but the first. Batch norm is over a micro-batch, whose size is the recipe's."""


class DCGANGenerator(nn.Module):
    """A linear layer to s x s, then n transposed convolutions that double it, with batch norm between."""

    def __init__(
        self,
        latent_dim: int = 64,
        width: int = 16,
        channels: int = 1,
        image_size: int = 28,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        size, halvings = smallest(image_size)
        widths = [width * 2**i for i in reversed(range(halvings))]  # 2^(n - 1) w, ..., w
        self.base = (widths[0], size, size)
        self.project = nn.Linear(latent_dim + num_classes, widths[0] * size**2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(count) for count in widths])
        self.ups = nn.ModuleList(
            [
                nn.ConvTranspose2d(i, o, 4, stride=2, padding=1, bias=False)
                for i, o in pairwise(widths)
            ]
        )
        self.image = nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1)
        initialise_as_published(self)

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latent (B, Z), standard normal, and label (B,) -> image (B, C, S, S) in [-1, 1]."""
        x = self.project(joined(latent, label, self.num_classes)).view(-1, *self.base)
        x = F.relu(self.norms[0](x))  # (B, 2^(n - 1) w, s, s)
        for up, norm in zip(self.ups, self.norms[1:], strict=True):
            x = F.relu(norm(up(x)))  # half the maps, twice the side
        return self.image(x).tanh()  # (B, C, S, S)


class DCGANDiscriminator(nn.Module):
    """n convolutions that halve the image, then a linear layer over what is left.

    Args:
        norm: batch, spectral or none. With a gradient penalty or clipped weights batch norm has no place.
    """

    def __init__(
        self,
        width: int = 16,
        norm: str = "batch",
        channels: int = 1,
        image_size: int = 28,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        make_norm = chosen(DISCRIMINATOR_NORMS, norm, "norm")
        size, halvings = smallest(image_size)
        widths = [channels + num_classes, *[width * 2**i for i in range(halvings)]]
        self.downs = nn.ModuleList(
            [
                nn.Conv2d(i, o, 4, stride=2, padding=1, bias=norm != "batch" or n == 0)
                for n, (i, o) in enumerate(pairwise(widths))
            ]
        )
        self.norms = nn.ModuleList([nn.Identity(), *[make_norm(count) for count in widths[2:]]])
        self.score = nn.Linear(widths[-1] * size**2, 1)
        if norm == "batch":
            initialise_as_published(self)
        else:
            initialise(self, slope=SLOPE)
        if norm == "spectral":
            for layer in [*self.downs, self.score]:
                spectral_norm(layer)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Image (B, C, S, S) and label (B,) -> score (B,)."""
        x = joined(image, label, self.num_classes)  # (B, C + K, S, S)
        for down, norm in zip(self.downs, self.norms, strict=True):
            x = F.leaky_relu(norm(down(x)), SLOPE)  # half the side, then twice the maps
        return self.score(x.flatten(1)).squeeze(1)  # (B,)


def smallest(image_size: int) -> tuple[int, int]:
    """(s, n): halved n times, down to s of 4 to 7 pixels: 28 is 7 after two, 32 is 4 after three."""
    size, halvings = image_size, 0
    while size >= 8 and size % 2 == 0:
        size, halvings = size // 2, halvings + 1
    if halvings == 0 or not 4 <= size <= 7:
        raise ValueError(
            f"image_size must be 4 to 7 times a power of 2 (28, 32, 64), got {image_size}"
        )
    return size, halvings


def initialise_as_published(model: nn.Module) -> None:
    """Draw the weights from the default generator, with the paper's deviation of 0.02: batch norm sets the scale."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=0.02)
            nn.init.zeros_(module.bias)
