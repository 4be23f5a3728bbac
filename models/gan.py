"""Convolutional generator and critic of a WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028).

Shapes: B images, Z latent numbers, C channels, S x S pixels, w width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.2
"""Of the critic's leaky ReLUs (DCGAN, Radford et al. 2016, arXiv:1511.06434)."""


class ConvGenerator(nn.Module):
    """Latent numbers to an image: two linear layers to S/4 x S/4, then two upsamplings by 2.

    No batch norm: an image depends on its own latent numbers alone, and there are no buffers.
    """

    def __init__(
        self,
        latent_dim: int = 64,
        width: int = 16,
        hidden: int = 256,
        channels: int = 1,
        image_size: int = 28,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.base = (2 * width, quarter(image_size), quarter(image_size))
        self.hidden = nn.Linear(latent_dim, hidden)
        self.project = nn.Linear(hidden, 2 * width * quarter(image_size) ** 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)
        initialise(self, slope=0.0)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent (B, Z), standard normal -> image (B, C, S, S) in [-1, 1]."""
        x = F.relu(self.hidden(latent))  # (B, hidden)
        x = F.relu(self.project(x).view(-1, *self.base))  # (B, 2w, S/4, S/4)
        x = F.relu(self.up1(x))  # (B, w, S/2, S/2)
        return self.up2(x).tanh()  # (B, C, S, S)


class ConvCritic(nn.Module):
    """Image to a score without bounds: two halvings, then two linear layers over the whole image.

    No batch norm: the gradient penalty is on the score of each image alone (Gulrajani, section 4).
    """

    def __init__(
        self, width: int = 16, hidden: int = 128, channels: int = 1, image_size: int = 28
    ) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.hidden = nn.Linear(2 * width * quarter(image_size) ** 2, hidden)
        self.score = nn.Linear(hidden, 1)
        initialise(self, slope=SLOPE)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) -> score (B,)."""
        x = F.leaky_relu(self.down1(image), SLOPE)  # (B, w, S/2, S/2)
        x = F.leaky_relu(self.down2(x), SLOPE)  # (B, 2w, S/4, S/4)
        x = F.leaky_relu(self.hidden(x.flatten(1)), SLOPE)  # (B, hidden)
        return self.score(x).squeeze(1)  # (B,)


def quarter(image_size: int) -> int:
    """The resolution two halvings below an image's."""
    if image_size < 4 or image_size % 4 != 0:
        raise ValueError(f"image_size must be a multiple of 4 (28, 32, 64, ...), got {image_size}")
    return image_size // 4


def initialise(model: nn.Module, slope: float) -> None:
    """Draw the weights from the default generator.

    Each keeps the variance of its input through a (leaky) ReLU (He et al. 2015, arXiv:1502.01852);
    without norms DCGAN's 0.02 would shrink the signal layer by layer.
    """
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # Of its kernel, an output pixel meets one weight in stride x stride.
            overlap = module.kernel_size[0] * module.kernel_size[1]
            fan_in = module.in_channels * overlap / (module.stride[0] * module.stride[1])
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
        else:
            continue
        nn.init.normal_(module.weight, std=(2 / (1 + slope**2) / fan_in) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
