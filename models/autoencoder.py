"""Autoencoders: through a narrow code and back, as perceptrons and convolutional.

Hinton and Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks". At depth 0 and with the
squared error the code spans the principal components (Baldi and Hornik 1989).
Shapes: B samples, F features, H hidden width, K context, Z numbers of a code; images C x S x S, w maps.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import activation_of


class Autoencoder(nn.Module):
    """Perceptrons of `depth` hidden layers to the code and back."""

    def __init__(
        self,
        in_features: int,
        code_dim: int = 32,
        depth: int = 1,
        width: int = 256,
        activation: str = "relu",
        code_activation: str = "identity",
    ) -> None:
        super().__init__()
        hidden = [width] * depth
        self.encoder = perceptron([in_features, *hidden, code_dim], activation)
        self.activation = activation_of(code_activation)
        self.decoder = perceptron([code_dim, *hidden, in_features], activation)
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F), or an image (B, C, S, S) with F = C S S -> code (B, Z), reconstruction of the shape of x."""
        code = self.activation(self.encoder(x.flatten(1)))  # (B, Z)
        return code, self.decoder(code).view_as(x)


class ConvAutoencoder(nn.Module):
    """Two halvings and two linear layers to the code, and the same back."""

    def __init__(
        self,
        code_dim: int = 32,
        width: int = 16,
        hidden: int = 256,
        channels: int = 1,
        image_size: int = 28,
        code_activation: str = "identity",
    ) -> None:
        super().__init__()
        self.encoder = Halvings(channels, image_size, width, hidden, code_dim)
        self.activation = activation_of(code_activation)
        self.decoder = Doublings(code_dim, hidden, width, image_size, channels)
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, C, S, S) -> code (B, Z), reconstruction (B, C, S, S)."""
        code = self.activation(self.encoder(x))  # (B, Z)
        return code, self.decoder(code)


class Halvings(nn.Module):
    """Image, and a context that joins it where it is a vector, to a vector."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        width: int,
        hidden: int,
        outputs: int,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.down2 = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.hidden = nn.Linear(2 * width * quarter(image_size) ** 2 + context, hidden)
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Image (B, C, S, S), context (B, K) -> (B, outputs)."""
        x = F.relu(self.down1(x))  # (B, w, S/2, S/2)
        x = F.relu(self.down2(x))  # (B, 2w, S/4, S/4)
        x = joined(x.flatten(1), context)  # (B, 2w S/4 S/4 + K)
        return self.output(F.relu(self.hidden(x)))


class Doublings(nn.Module):
    """A vector to an image: the way back of `Halvings`."""

    def __init__(
        self, inputs: int, hidden: int, width: int, image_size: int, channels: int
    ) -> None:
        super().__init__()
        self.base = (2 * width, quarter(image_size), quarter(image_size))
        self.hidden = nn.Linear(inputs, hidden)
        self.project = nn.Linear(hidden, 2 * width * quarter(image_size) ** 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, C, S, S), without bounds."""
        x = F.relu(self.hidden(x))  # (B, H)
        x = F.relu(self.project(x).view(-1, *self.base))  # (B, 2w, S/4, S/4)
        x = F.relu(self.up1(x))  # (B, w, S/2, S/2)
        return self.up2(x)  # (B, C, S, S)


def perceptron(sizes: list[int], activation: str) -> nn.Sequential:
    """Affine layers from each size to the next, with an activation between any two."""
    if min(sizes) < 1:
        raise ValueError(f"sizes of layers must be 1 or more, got {sizes}")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation_of(activation)]
    return nn.Sequential(*layers[:-1])


def joined(x: Tensor, context: Tensor | None) -> Tensor:
    """(B, F) and (B, K) -> (B, F + K)."""
    return x if context is None else torch.cat([x, context], dim=1)


def quarter(image_size: int) -> int:
    """The resolution two halvings below an image's."""
    if image_size < 4 or image_size % 4 != 0:
        raise ValueError(f"image_size must be a multiple of 4 (28, 32, 64, ...), got {image_size}")
    return image_size // 4


def initialise(model: nn.Module) -> None:
    """Draw the weights from the default generator: each keeps the variance of its input through a ReLU
    (He et al. 2015, arXiv:1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            # Of its kernel, an output pixel meets one weight in stride x stride.
            overlap = module.kernel_size[0] * module.kernel_size[1]
            fan_in = module.in_channels * overlap / (module.stride[0] * module.stride[1])
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
        else:
            continue
        nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
        assert module.bias is not None
        nn.init.zeros_(module.bias)
