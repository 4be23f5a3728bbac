"""Residual networks (He et al. 2015, arXiv:1512.03385): for small images (section 4.2) and for ImageNet (table 1).

Shapes: B images, C channels, H x W pixels, w width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import chosen, convolution, norm_of


class Subsample(nn.Module):
    """Every `stride`-th pixel, and zeros in the new channels: a shortcut without weights (option A of the paper)."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + new, H/stride, W/stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class Nothing(nn.Module):
    """No shortcut: 0 is added, as in the plain networks that the paper compares with."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> 0-d."""
        return torch.zeros((), dtype=x.dtype, device=x.device)


def projection(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Module:
    """A 1x1 convolution (option B of the paper)."""
    return nn.Sequential(
        convolution(in_channels, out_channels, 1, stride), norm_of(norm, out_channels)
    )


SHORTCUTS: dict[str, Callable[[int, int, int, str], nn.Module]] = {
    "projection": projection,
    "identity": lambda before, after, stride, norm: Subsample(stride, after - before),
    "none": lambda before, after, stride, norm: Nothing(),
}
"""What is added to a block's output where it has another shape than the input; `none` adds nothing anywhere."""


def shortcut_of(
    kind: str, in_channels: int, out_channels: int, stride: int, norm: str
) -> nn.Module:
    """The shortcut of one block: the input itself where the shape stays."""
    make = chosen(SHORTCUTS, kind, "shortcut")
    if kind != "none" and stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return make(in_channels, out_channels, stride, norm)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: str = "projection",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, 3, stride)
        self.norm1 = norm_of(norm, width)
        self.conv2 = convolution(width, width, 3)
        self.norm2 = norm_of(norm, width)
        self.shortcut = shortcut_of(shortcut, in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, w, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 to w channels, 3x3, 1x1 to 4w, and a shortcut.

    The stride stands at the 3x3, as everyone trains it since; the paper has it at the first 1x1, which reads a
    quarter of the pixels.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: str = "projection",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, width, 1)
        self.norm1 = norm_of(norm, width)
        self.conv2 = convolution(width, width, 3, stride)
        self.norm2 = norm_of(norm, width)
        self.conv3 = convolution(width, 4 * width, 1)
        self.norm3 = norm_of(norm, 4 * width)
        self.shortcut = shortcut_of(shortcut, in_channels, 4 * width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4w, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """For small images: `depth` = 6n + 2 layers: a stem, stages of n blocks (widths w, 2w, 4w), a classifier.

    A `stem_stride` of 2 halves the image first, for a quarter of the work.
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 16,
        in_channels: int = 1,
        num_classes: int = 10,
        stem_stride: int = 1,
        shortcut: str = "projection",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, ...), got {depth}")
        blocks, kind = (depth - 2) // 6, (ResidualBlock, shortcut, norm)
        self.stem = nn.Sequential(
            convolution(in_channels, width, 3, stem_stride), norm_of(norm, width), nn.ReLU()
        )
        self.stage1 = stage(kind, blocks, width, width, stride=1)
        self.stage2 = stage(kind, blocks, width, 2 * width, stride=2)
        self.stage3 = stage(kind, blocks, 2 * width, 4 * width, stride=2)
        self.classifier = nn.Linear(4 * width, num_classes)
        initialise(self, self.classifier)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> logits (B, K), written for a stem of stride 1."""
        x = self.stem(image)  # (B, w, H, W)
        x = self.stage1(x)  # (B, w, H, W)
        x = self.stage2(x)  # (B, 2w, H/2, W/2)
        x = self.stage3(x)  # (B, 4w, H/4, W/4)
        x = x.mean(dim=(2, 3))  # (B, 4w)
        return self.classifier(x)  # (B, K)


DEPTHS: dict[int, tuple[type[ResidualBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (ResidualBlock, (2, 2, 2, 2)),
    34: (ResidualBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
"""Kind of block, and how many in each stage."""


class ImageNetResNet(nn.Module):
    """For images of about 224 pixels: a stem that quarters them, four stages (widths w, 2w, 4w, 8w), a classifier."""

    def __init__(
        self,
        depth: int = 50,
        width: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        shortcut: str = "projection",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        block, counts = chosen(DEPTHS, depth, "depth")
        kind = (block, shortcut, norm)
        self.stem = nn.Sequential(
            convolution(in_channels, width, 7, stride=2),
            norm_of(norm, width),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        e = block.expansion
        self.stage1 = stage(kind, counts[0], width, width, stride=1)
        self.stage2 = stage(kind, counts[1], e * width, 2 * width, stride=2)
        self.stage3 = stage(kind, counts[2], 2 * e * width, 4 * width, stride=2)
        self.stage4 = stage(kind, counts[3], 4 * e * width, 8 * width, stride=2)
        self.classifier = nn.Linear(8 * e * width, num_classes)
        initialise(self, self.classifier)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> logits (B, K); e is 4 for bottlenecks, else 1."""
        x = self.stem(image)  # (B, w, H/4, W/4)
        x = self.stage1(x)  # (B, ew, H/4, W/4)
        x = self.stage2(x)  # (B, 2ew, H/8, W/8)
        x = self.stage3(x)  # (B, 4ew, H/16, W/16)
        x = self.stage4(x)  # (B, 8ew, H/32, W/32)
        x = x.mean(dim=(2, 3))  # (B, 8ew)
        return self.classifier(x)  # (B, K)


Kind = tuple[type[ResidualBlock] | type[Bottleneck], str, str]
"""(block, shortcut, norm)."""


def stage(kind: Kind, blocks: int, in_channels: int, width: int, stride: int) -> nn.Sequential:
    """`blocks` residual blocks, of which the first changes the resolution and the channels."""
    block, shortcut, norm = kind
    first = block(in_channels, width, stride, shortcut, norm)
    channels = block.expansion * width
    rest = [block(channels, width, 1, shortcut, norm) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def initialise(model: nn.Module, classifier: nn.Linear) -> None:
    """Draw the weights from the default generator."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # A ReLU halves the variance: with sqrt(2 / fan_out) that of the gradients stays the
            # same through the depth (He et al. 2015, arXiv:1502.01852).
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    # Logits near 0: the first loss is ln(K), whatever the features.
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
