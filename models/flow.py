"""Normalising flows: invertible networks of which log |det dz/dx| is known.

NICE (Dinh et al. 2015, arXiv:1410.8516): additive couplings over halves of a vector, then a scale a dimension. RealNVP
(Dinh et al. 2017, arXiv:1605.08803): affine couplings over images, by checkerboards and by channels, at several scales.
A coupling changes one half of its input by a function of the other: y = x * exp(s) + t, with s = 0 where additive.
Shapes: B samples, D numbers of a sample, H hidden width; images C x S x S, w maps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.autoencoder import perceptron
from dist_train.models.layers import chosen, convolution, norm_of

PARTS = {"additive": 1, "affine": 2}
"""How many numbers a coupling needs for each that it changes: t, or s and t."""


class NICE(nn.Module):
    """Couplings over vectors, whose halves (even and odd places) take turns, each by a perceptron; then a scale."""

    def __init__(
        self,
        in_features: int,
        couplings: int = 4,
        depth: int = 2,
        width: int = 256,
        coupling: str = "additive",
    ) -> None:
        super().__init__()
        parts = chosen(PARTS, coupling, "coupling")
        if in_features < 2:
            raise ValueError(f"in_features must be 2 or more, to have halves, got {in_features}")
        halves = [(in_features + 1) // 2, in_features // 2]
        self.couplings = nn.ModuleList(
            VectorCoupling(i % 2, halves[1 - i % 2], halves[i % 2], parts, depth, width)
            for i in range(couplings)
        )
        self.log_scale = nn.Parameter(torch.zeros(in_features))
        initialise(self)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """x (B, D), or an image (B, C, S, S) -> z of its shape, log |det dz/dx| (B,). With `inverse` z -> x, and the
        log of |det dx/dz|."""
        sign = -1 if inverse else 1
        flat, log_det = x.flatten(1), sign * self.log_scale.sum().expand(len(x))  # (B, D), (B,)
        if inverse:
            flat = flat * (-self.log_scale).exp()
        for coupling in reversed(self.couplings) if inverse else self.couplings:
            flat, change = coupling(flat, inverse)
            log_det = log_det + change
        return (flat if inverse else flat * self.log_scale.exp()).view_as(x), log_det


class VectorCoupling(nn.Module):
    """Changes the numbers at even (0) or odd (1) places by those at the others."""

    def __init__(
        self, changed: int, inputs: int, outputs: int, parts: int, depth: int, width: int
    ) -> None:
        super().__init__()
        self.changed, self.parts = changed, parts
        self.layers = perceptron([inputs, *[width] * depth, parts * outputs], "relu")

    def forward(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(B, D) -> (B, D), (B,)."""
        kept, moved = x[:, 1 - self.changed :: 2], x[:, self.changed :: 2]
        moved, log_det = coupled(moved, self.layers(kept), self.parts, inverse)
        y = torch.empty_like(x)
        y[:, 1 - self.changed :: 2], y[:, self.changed :: 2] = kept, moved
        return y, log_det.sum(dim=1)


class RealNVP(nn.Module):
    """At each of `scales`: three couplings by checkerboards, a squeeze (C, S, S) -> (4C, S/2, S/2), three by channels,
    and half of the channels leave; at the last scale four by checkerboards instead."""

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 28,
        scales: int = 2,
        width: int = 16,
        blocks: int = 1,
        norm: str = "layer",
        coupling: str = "affine",
    ) -> None:
        super().__init__()
        parts = chosen(PARTS, coupling, "coupling")
        if scales < 1 or image_size % 2 ** (scales - 1) != 0:
            raise ValueError(
                f"image_size must be a multiple of {2 ** max(0, scales - 1)} for {scales} scales, got {image_size}"
            )
        self.image_shape = (channels, image_size, image_size)
        self.checkerboards, self.by_channels = nn.ModuleList(), nn.ModuleList()
        for scale in range(scales):
            last, maps = scale == scales - 1, (channels, width, blocks, norm, parts)
            count = 4 if last else 3
            self.checkerboards.append(
                nn.ModuleList(ImageCoupling("checkerboard", i % 2, *maps) for i in range(count))
            )
            if not last:
                maps = (4 * channels, 2 * width, blocks, norm, parts)
                self.by_channels.append(
                    nn.ModuleList(ImageCoupling("channels", i % 2, *maps) for i in range(3))
                )
                channels, width = 2 * channels, 2 * width
        initialise(self)

    def forward(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """x (B, C, S, S) -> z of its shape, log |det dz/dx| (B,). With `inverse` z -> x, and the log of |det dx/dz|.

        z holds what left at each scale, the first scale's first, as it comes.
        """
        return self._inverse(x) if inverse else self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape, left = x.shape, []
        log_det = x.new_zeros(len(x))
        for scale, checkerboards in enumerate(self.checkerboards):
            x, log_det = through(checkerboards, x, log_det, inverse=False)
            if scale < len(self.by_channels):
                x = F.pixel_unshuffle(x, 2)  # (B, C, S, S) -> (B, 4C, S/2, S/2)
                x, log_det = through(self.by_channels[scale], x, log_det, inverse=False)
                gone, x = x.chunk(2, dim=1)  # (B, 2C, S/2, S/2) each
                left.append(gone.flatten(1))
        return torch.cat([*left, x.flatten(1)], dim=1).view(shape), log_det

    def _inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        channels, size, _ = self.image_shape
        shapes, scales = [], len(self.checkerboards)
        for _ in range(scales - 1):
            channels, size = 2 * channels, size // 2
            shapes.append((channels, size, size))
        shapes.append(shapes[-1] if shapes else self.image_shape)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        *left, x = z.flatten(1).split(sizes, dim=1)
        x, log_det = x.view(-1, *shapes[-1]), z.new_zeros(len(z))
        for scale in reversed(range(scales)):
            if scale < len(self.by_channels):
                x = torch.cat([left[scale].view_as(x), x], dim=1)  # (B, 4C, S/2, S/2)
                x, log_det = through(self.by_channels[scale], x, log_det, inverse=True)
                x = F.pixel_shuffle(x, 2)  # (B, C, S, S)
            x, log_det = through(self.checkerboards[scale], x, log_det, inverse=True)
        return x, log_det


class ImageCoupling(nn.Module):
    """Changes one colour of a checkerboard of pixels, or half of the channels, by a residual network of the rest."""

    def __init__(
        self, by: str, changed: int, channels: int, width: int, blocks: int, norm: str, parts: int
    ) -> None:
        super().__init__()
        self.by, self.changed, self.parts = by, changed, parts
        channels = channels if by == "checkerboard" else channels // 2
        self.layers = nn.Sequential(
            convolution(channels, width, 3, bias=True),
            *(Residual(width, norm) for _ in range(blocks)),
            nn.ReLU(),
            convolution(width, parts * channels, 3, bias=True),
        )

    def forward(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(B, C, S, S) -> (B, C, S, S), (B,)."""
        if self.by == "checkerboard":
            moving = checkerboard(x, self.changed)  # (1, 1, S, S), 1 where x changes
            moved, log_det = coupled(x, self.layers(x * (1 - moving)), self.parts, inverse)
            y = torch.where(moving.bool(), moved, x)
            return y, (log_det * moving).flatten(1).sum(dim=1)
        halves = list(x.chunk(2, dim=1))
        kept, moved = halves[1 - self.changed], halves[self.changed]
        halves[self.changed], log_det = coupled(moved, self.layers(kept), self.parts, inverse)
        return torch.cat(halves, dim=1), log_det.flatten(1).sum(dim=1)


class Residual(nn.Module):
    """x + f(x) with two convolutions, each after norm and ReLU."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            norm_of(norm, width),
            nn.ReLU(),
            convolution(width, width, 3, bias=True),
            norm_of(norm, width),
            nn.ReLU(),
            convolution(width, width, 3, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, w, S, S) -> (B, w, S, S)."""
        return x + self.layers(x)


def coupled(x: Tensor, numbers: Tensor, parts: int, inverse: bool) -> tuple[Tensor, Tensor]:
    """x * exp(s) + t, or its inverse, and the log of its slope, all of the shape of x; `numbers` are t, or s and t.

    s is within (-2, 2): without a bound the inverse can overflow where training has never been.
    """
    if parts == 1:
        return (x - numbers if inverse else x + numbers), torch.zeros_like(x)
    # in the type of x: exp of an s in half precision is not of the slope that s says
    s, t = numbers.to(x.dtype).chunk(2, dim=1)
    s = 2 * (s / 2).tanh()
    return ((x - t) * (-s).exp(), -s) if inverse else (x * s.exp() + t, s)


def through(
    couplings: nn.Module, x: Tensor, log_det: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    assert isinstance(couplings, nn.ModuleList)
    for coupling in reversed(couplings) if inverse else couplings:
        x, change = coupling(x, inverse)
        log_det = log_det + change
    return x, log_det


def checkerboard(x: Tensor, colour: int) -> Tensor:
    """(1, 1, S, S): 1 where row + column is even (colour 0) or odd (1)."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    return ((rows[:, None] + columns + colour) % 2 == 0).to(x)[None, None]


def initialise(model: nn.Module) -> None:
    """Draw the weights from the default generator: He's variance, and 0 in the last layer of each coupling, so that the
    flow starts as the identity."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (VectorCoupling, ImageCoupling)):
            last = module.layers[-1]
            assert isinstance(last, (nn.Linear, nn.Conv2d))
            nn.init.zeros_(last.weight)
