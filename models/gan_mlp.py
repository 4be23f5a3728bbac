"""The first generative adversarial nets: fully connected, 2 x 512 (Goodfellow et al. 2014, arXiv:1406.2661).

With classes they are conditional: the label, one-hot, is joined to z and to x (Mirza and Osindero 2014,
arXiv:1411.1784). Shapes: B images, Z latent numbers, K classes, C channels, S x S pixels, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.gan import SLOPE, initialise


class MLPGenerator(nn.Module):
    """Latent numbers, and a class where there are classes, to an image through two hidden layers."""

    def __init__(
        self,
        latent_dim: int = 64,
        hidden: int = 512,
        channels: int = 1,
        image_size: int = 28,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.latent_dim, self.num_classes = latent_dim, num_classes
        self.shape = (channels, image_size, image_size)
        self.hidden1 = nn.Linear(latent_dim + num_classes, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.image = nn.Linear(hidden, channels * image_size**2)
        initialise(self, slope=0.0)

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        """Latent (B, Z), standard normal, and label (B,) -> image (B, C, S, S) in [-1, 1]."""
        x = joined(latent, label, self.num_classes)  # (B, Z + K)
        x = F.relu(self.hidden1(x))  # (B, H)
        x = F.relu(self.hidden2(x))  # (B, H)
        return self.image(x).tanh().view(-1, *self.shape)  # (B, C, S, S)


class MLPDiscriminator(nn.Module):
    """An image, and its class where there are classes, to a score: the logit of its being real."""

    def __init__(
        self, hidden: int = 512, channels: int = 1, image_size: int = 28, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.hidden1 = nn.Linear(channels * image_size**2 + num_classes, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1)
        initialise(self, slope=SLOPE)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Image (B, C, S, S) and label (B,) -> score (B,)."""
        x = joined(image.flatten(1), label, self.num_classes)  # (B, C S S + K)
        x = F.leaky_relu(self.hidden1(x), SLOPE)  # (B, H)
        x = F.leaky_relu(self.hidden2(x), SLOPE)  # (B, H)
        return self.score(x).squeeze(1)  # (B,)


def joined(x: Tensor, label: Tensor | None, num_classes: int) -> Tensor:
    """x (B, D, ...) with the label (B,) beside it, one-hot: (B, D + K, ...), the same at every position."""
    check_label(label, num_classes)
    if label is None:
        return x
    one_hot = F.one_hot(label, num_classes).to(x.dtype)  # (B, K)
    one_hot = one_hot.view(len(x), num_classes, *[1] * (x.ndim - 2))
    return torch.cat([x, one_hot.expand(-1, -1, *x.shape[2:])], dim=1)


def check_label(label: Tensor | None, num_classes: int) -> None:
    """ValueError: a network with classes was given no label, or one without classes was given one."""
    if (label is None) != (num_classes == 0):
        given = "no label" if label is None else "a label"
        raise ValueError(f"num_classes is {num_classes}, but the network was given {given}")
