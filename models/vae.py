"""Variational autoencoders: Gaussian encoders, decoders for any likelihood, a table instead of an encoder.

Kingma and Welling 2014, "Auto-encoding variational Bayes", arXiv:1312.6114. What the decoder's numbers mean (a mean,
logits, ...) is the objective's; `per_element` says how many of them an element of x has.
Shapes: B samples, K classes of a condition (0: none), Z latent numbers, P per element; x (B, C, S, S) or (B, F).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.autoencoder import Doublings, Halvings, initialise, joined, perceptron


class VAEEncoder(nn.Module):
    """q(z | x, label) by a perceptron of `depth` hidden layers."""

    def __init__(
        self,
        in_features: int,
        latent_dim: int = 16,
        depth: int = 1,
        width: int = 256,
        activation: str = "relu",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        sizes = [in_features + num_classes, *[width] * depth, 2 * latent_dim]
        self.layers = perceptron(sizes, activation)
        initialise(self)
        start_at_the_prior(self.layers[-1])

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x of F numbers a sample, label (B,) -> mean (B, Z), log variance (B, Z)."""
        mean, log_variance = self.layers(
            joined(x.flatten(1), one_hot(label, self.num_classes))
        ).chunk(2, dim=1)
        return mean, log_variance


class VAEDecoder(nn.Module):
    """p(x | z, label) by a perceptron, as numbers of the likelihood: `shape` is that of a sample, as [1, 28, 28]."""

    def __init__(
        self,
        shape: Sequence[int],
        latent_dim: int = 16,
        depth: int = 1,
        width: int = 256,
        activation: str = "relu",
        per_element: int = 1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes, self.shape = num_classes, (per_element * shape[0], *shape[1:])
        outputs = torch.Size(self.shape).numel()
        self.layers = perceptron([latent_dim + num_classes, *[width] * depth, outputs], activation)
        initialise(self)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Latent (B, Z), label (B,) -> (B, P C, S, S), or (B, P F)."""
        return self.layers(joined(z, one_hot(label, self.num_classes))).view(-1, *self.shape)


class VAEConvEncoder(nn.Module):
    """q(z | x, label) by two halvings and two linear layers."""

    def __init__(
        self,
        latent_dim: int = 16,
        width: int = 16,
        hidden: int = 256,
        channels: int = 1,
        image_size: int = 28,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = Halvings(channels, image_size, width, hidden, 2 * latent_dim, num_classes)
        initialise(self)
        start_at_the_prior(self.layers.output)

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image (B, C, S, S), label (B,) -> mean (B, Z), log variance (B, Z)."""
        mean, log_variance = self.layers(x, one_hot(label, self.num_classes)).chunk(2, dim=1)
        return mean, log_variance


class VAEConvDecoder(nn.Module):
    """p(x | z, label) by two linear layers and two doublings."""

    def __init__(
        self,
        latent_dim: int = 16,
        width: int = 16,
        hidden: int = 256,
        channels: int = 1,
        image_size: int = 28,
        per_element: int = 1,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        inputs, outputs = latent_dim + num_classes, per_element * channels
        self.layers = Doublings(inputs, hidden, width, image_size, outputs)
        initialise(self)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Latent (B, Z), label (B,) -> (B, P C, S, S)."""
        return self.layers(joined(z, one_hot(label, self.num_classes)))


class VAETable(nn.Module):
    """q(z) of each training sample as parameters of its own: inference without an encoder (Hoffman et al. 2013,
    arXiv:1206.7051, with Gaussian local factors). It knows nothing of any other sample."""

    def __init__(self, num_samples: int, latent_dim: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(num_samples, 2 * latent_dim)
        nn.init.zeros_(self.table.weight)  # each starts at the prior

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of samples (B,) -> mean (B, Z), log variance (B, Z)."""
        mean, log_variance = self.table(ids).chunk(2, dim=1)
        return mean, log_variance


def one_hot(label: Tensor | None, num_classes: int) -> Tensor | None:
    """(B,) -> (B, K), or nothing where there is no condition."""
    if (label is None) != (num_classes == 0):
        raise ValueError(f"num_classes is {num_classes}, but the label is {label!r:.40}")
    return None if label is None else F.one_hot(label, num_classes).float()


def start_at_the_prior(output: nn.Module) -> None:
    """Mean near 0 and variance near 1: the divergence starts near 0, not at what a random layer gives."""
    assert isinstance(output, nn.Linear)
    nn.init.normal_(output.weight, std=0.01)
