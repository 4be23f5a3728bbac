"""Translator and discriminator of a CycleGAN (Zhu et al. 2017, arXiv:1703.10593), sized for small pictures.

Shapes: B images, C channels, S x S pixels, w width, n halvings.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.gan import SLOPE

EDGE = 0.999
"""As near to -1 and 1 as a pixel comes before its inverse tanh is taken."""


class Translator(nn.Module):
    """Image of one domain to an image of the other: halvings, residual blocks, doublings, all instance-normalised.

    Args:
        skip: what the network puts out is added to the inverse tanh of its input, so that it starts as the identity and
            learns the difference between the domains. The paper has none.
    """

    def __init__(
        self,
        width: int = 16,
        blocks: int = 3,
        halvings: int = 2,
        channels: int = 3,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.skip = skip
        widths = [width * 2**i for i in range(halvings + 1)]  # w, 2w, ..., 2^n w
        pairs = list(pairwise(widths))
        self.first = reflected(channels, width, 5, bias=False)
        self.downs = nn.ModuleList(
            [nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False) for i, o in pairs]
        )
        self.blocks = nn.ModuleList([Residual(widths[-1]) for _ in range(blocks)])
        self.ups = nn.ModuleList(
            [
                nn.ConvTranspose2d(o, i, 4, stride=2, padding=1, bias=False)
                for i, o in reversed(pairs)
            ]
        )
        norms = [*widths, *reversed(widths[:-1])]
        self.norms = nn.ModuleList([nn.InstanceNorm2d(count, affine=True) for count in norms])
        self.last = reflected(width, channels, 5, bias=True)
        initialise(self)
        if skip:
            nn.init.zeros_(self.last.weight)  # the identity

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) in [-1, 1] -> image (B, C, S, S) in [-1, 1]; S is a multiple of 2^n."""
        half = len(self.downs) + 1
        x = F.relu(self.norms[0](self.first(image)))  # (B, w, S, S)
        for down, norm in zip(self.downs, self.norms[1:half], strict=True):
            x = F.relu(norm(down(x)))  # twice the maps, half the side
        for block in self.blocks:
            x = block(x)  # (B, 2^n w, S / 2^n, S / 2^n)
        for up, norm in zip(self.ups, self.norms[half:], strict=True):
            x = F.relu(norm(up(x)))  # half the maps, twice the side
        x = self.last(x)  # (B, C, S, S)
        if self.skip:
            x = x + torch.atanh(EDGE * image)
        return x.tanh()


class Residual(nn.Module):
    """x + two convolutions of it (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = reflected(width, width, 3, bias=False)
        self.conv2 = reflected(width, width, 3, bias=False)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.norm2 = nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, w, S, S) -> the same."""
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class PatchDiscriminator(nn.Module):
    """A score for every patch of an image, in place of one for all of it (Isola et al. 2017, arXiv:1611.07004)."""

    def __init__(self, width: int = 16, halvings: int = 2, channels: int = 3) -> None:
        super().__init__()
        widths = [channels, *[width * 2**i for i in range(halvings)]]
        self.downs = nn.ModuleList(
            [
                nn.Conv2d(i, o, 4, stride=2, padding=1, bias=n == 0)
                for n, (i, o) in enumerate(pairwise(widths))
            ]
        )
        self.norms = nn.ModuleList(
            [nn.Identity(), *[nn.InstanceNorm2d(count, affine=True) for count in widths[2:]]]
        )
        self.score = nn.Conv2d(widths[-1], 1, 3, padding=1)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) -> scores (B, 1, S / 2^n, S / 2^n)."""
        x = image
        for down, norm in zip(self.downs, self.norms, strict=True):
            x = F.leaky_relu(norm(down(x)), SLOPE)  # half the side
        return self.score(x)


def reflected(in_channels: int, out_channels: int, kernel: int, *, bias: bool) -> nn.Conv2d:
    """A same-sized convolution that sees the image mirrored at its edges."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias
    )


def initialise(model: nn.Module) -> None:
    """Draw the weights from the default generator, with the paper's deviation of 0.02: norms set the scale."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
