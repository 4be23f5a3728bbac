"""BigGAN (Brock et al. 2019, arXiv:1809.11096), sized for small pictures: residual, conditional, with self-attention.

Classes reach the generator through its batch norms (De Vries et al. 2017, arXiv:1707.00683), the discriminator through
a projection (Miyato and Koyama 2018, arXiv:1802.05637). Both attend to all positions at half the picture's side
(Zhang et al. 2019, SAGAN, arXiv:1805.08318). Unlike in the paper the generator has no spectral norm.
Shapes: B images, Z latent numbers, K classes, E numbers a class, D numbers of a condition, C channels, S x S pixels,
w width, n doublings from s to S pixels, i maps in, o maps out, H x H positions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from dist_train.models.dcgan import smallest
from dist_train.models.gan_mlp import check_label
from dist_train.models.layers import convolution


class BigGANGenerator(nn.Module):
    """A linear layer to s x s, then n residual blocks that double it, with attention before the last.

    z is cut into n + 1 equal parts: one makes the first maps, the others stand beside the class's embedding, which all
    blocks share, as the conditions of their batch norms.
    """

    def __init__(
        self,
        latent_dim: int = 64,
        width: int = 16,
        embedding: int = 32,
        channels: int = 3,
        image_size: int = 32,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        size, doublings = smallest(image_size)
        self.parts = doublings + 1
        if latent_dim % self.parts:
            raise ValueError(
                f"latent_dim must be a multiple of {self.parts}, the parts that image_size {image_size} cuts it into,"
                f" got {latent_dim}"
            )
        largest = width * 2 ** (doublings - 1)
        widths = [largest, *[largest // 2**i for i in range(doublings)]]  # 2^(n-1) w twice, ..., w
        self.base = (largest, size, size)
        self.project = nn.Linear(latent_dim // self.parts, largest * size**2)
        condition = latent_dim // self.parts
        if num_classes:
            self.embedding = nn.Embedding(num_classes, embedding)
            condition += embedding
        self.blocks = nn.ModuleList([GeneratorBlock(i, o, condition) for i, o in pairwise(widths)])
        self.attention = SelfAttention(widths[-2])
        self.norm = nn.BatchNorm2d(width)
        self.image = FilterConv2d(width, channels, 3, padding=1)
        initialise(self)

    def forward(
        self, latent: Tensor, label: Tensor | None = None, with_term: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Latent (B, Z), standard normal, and label (B,) -> image (B, C, S, S) in [-1, 1].

        `with_term` gives beside it the orthogonal term of all convolutions (0-d), those of attention left out.
        """
        check_label(label, self.num_classes)
        first, *others = latent.chunk(self.parts, dim=1)  # (B, Z / (n + 1)) each
        shared = [self.embedding(label)] if self.num_classes else []  # (B, E)
        x = self.project(first).view(-1, *self.base)  # (B, 2^(n-1) w, s, s)
        terms = []
        for index, (block, part) in enumerate(zip(self.blocks, others, strict=True)):
            if index == len(others) - 1:
                x = self.attention(x)  # (B, i, S/2, S/2)
            x, term = block(x, torch.cat([part, *shared], dim=1))  # half the maps, twice the side
            terms.append(term)
        x, term = self.image(F.relu(self.norm(x)))  # (B, C, S, S)
        image = x.tanh()
        return (image, term + sum(terms)) if with_term else image


class GeneratorBlock(nn.Module):
    """Two convolutions after conditional norms, at twice the side, added to a 1 x 1 convolution of the input.

    No convolution has a bias: the next norm would take it away.
    """

    def __init__(self, in_channels: int, out_channels: int, condition: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm2d(in_channels, condition)
        self.conv1 = FilterConv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = ConditionalBatchNorm2d(out_channels, condition)
        self.conv2 = FilterConv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = FilterConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(B, i, H, H) and (B, D) -> (B, o, 2H, 2H), and the orthogonal term (0-d) of its convolutions."""
        y, term1 = self.conv1(doubled(F.relu(self.norm1(x, condition))))  # (B, o, 2H, 2H)
        y, term2 = self.conv2(F.relu(self.norm2(y, condition)))
        short, term3 = self.shortcut(doubled(x))
        return short + y, term1 + term2 + term3


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm whose gain and shift each sample's condition gives: linear in it, around 1 and around 0."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Linear(condition, channels, bias=False)
        self.shift = nn.Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, i, H, H) and (B, D) -> (B, i, H, H)."""
        gain, shift = 1 + self.gain(condition), self.shift(condition)  # (B, i)
        return self.norm(x) * gain[:, :, None, None] + shift[:, :, None, None]


class FilterConv2d(nn.Conv2d):
    """A convolution that also gives the orthogonal term of its filters.

    It does so in its own forward, which is where a weight is whole under every strategy.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, i, H, H) -> (B, o, H, H), and the term (0-d)."""
        return super().forward(x), orthogonal_term(self.weight)


def orthogonal_term(weight: Tensor) -> Tensor:
    """||W W' * (1 - I)||_F^2 of filters (o, ...) as the rows of W: the squares of the products of any two.

    BigGAN's eq. 3 without beta, where filters are columns. Their lengths are free. Never in half precision.
    """
    filters = weight.flatten(1)
    with torch.autocast(weight.device.type, enabled=False):
        return 2 * (filters @ filters.T).tril(-1).square().sum()  # each pair stands there twice


class SelfAttention(nn.Module):
    """x + gate attention(x) over all positions; the gate is learnt, and starts at 0 (SAGAN, eq. 1 to 3).

    Queries and keys have an eighth of the maps, values half of them, as BigGAN has it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, half = max(channels // 8, 1), max(channels // 2, 1)
        self.key = convolution(channels, narrow, 1)
        self.query = convolution(channels, narrow, 1)
        self.value = convolution(channels, half, 1)
        self.output = convolution(half, channels, 1)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, i, H, H) -> the same."""
        keys, queries, values = (
            layer(x).flatten(2) for layer in (self.key, self.query, self.value)
        )  # (B, i/8, HH) twice, (B, i/2, HH)
        share = (queries.mT @ keys).softmax(dim=-1)  # (B, HH, HH): of each position, over all
        seen = (values @ share.mT).unflatten(2, x.shape[2:])  # (B, i/2, H, H)
        return x + self.gate * self.output(seen)


class BigGANDiscriminator(nn.Module):
    """n residual blocks that halve the picture, with attention after the first, and one that does not.

    What comes out is summed over the positions: h. The score is linear in h, plus the product of h and a vector of the
    class. Every weight but attention's gate is spectrally normalised (Miyato et al. 2018, arXiv:1802.05957).
    """

    def __init__(
        self, width: int = 16, channels: int = 3, image_size: int = 32, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        _, halvings = smallest(image_size)
        widths = [channels, *[width * 2**i for i in range(halvings)]]  # C, w, ..., 2^(n-1) w
        self.blocks = nn.ModuleList(
            [
                DiscriminatorBlock(i, o, first=n == 0, halve=True)
                for n, (i, o) in enumerate(pairwise(widths))
            ]
        )
        self.blocks.append(DiscriminatorBlock(widths[-1], widths[-1], first=False, halve=False))
        self.attention = SelfAttention(width)
        self.score = nn.Linear(widths[-1], 1)
        if num_classes:
            self.embedding = nn.Embedding(num_classes, widths[-1])
        initialise(self)
        for layer in list(self.modules()):
            if isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
                spectral_norm(layer)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Image (B, C, S, S) and label (B,) -> score (B,)."""
        check_label(label, self.num_classes)
        x = self.attention(self.blocks[0](image))  # (B, w, S/2, S/2)
        for block in self.blocks[1:]:
            x = block(x)  # twice the maps, half the side; the last leaves both
        h = F.relu(x).sum(dim=(2, 3))  # (B, 2^(n-1) w)
        score = self.score(h).squeeze(1)  # (B,)
        return score + (self.embedding(label) * h).sum(dim=1) if self.num_classes else score


class DiscriminatorBlock(nn.Module):
    """Two convolutions, halved by an average, added to the input (a 1 x 1 convolution of it where maps or side change).

    Args:
        first: of the network: it sees the picture itself, not its ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, *, first: bool, halve: bool) -> None:
        super().__init__()
        self.before = nn.Identity() if first else nn.ReLU()
        self.conv1 = convolution(in_channels, out_channels, 3, bias=True)
        self.conv2 = convolution(out_channels, out_channels, 3, bias=True)
        self.after: nn.Module = nn.AvgPool2d(2) if halve else nn.Identity()
        self.shortcut: nn.Module = (
            convolution(in_channels, out_channels, 1, bias=True)
            if halve or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, i, H, H) -> (B, o, H, H), or (B, o, H/2, H/2)."""
        y = self.conv2(F.relu(self.conv1(self.before(x))))
        return self.after(y + self.shortcut(x))


def doubled(x: Tensor) -> Tensor:
    """(B, i, H, H) -> (B, i, 2H, 2H): each pixel four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def initialise(model: nn.Module) -> None:
    """Draw the weights from the default generator: orthogonal, as published; biases are 0, attention's gate too."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
