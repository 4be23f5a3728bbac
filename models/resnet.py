"""Residual network for small images (He et al. 2015, arXiv:1512.03385, section 4.2).

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A same-padded convolution without bias: the batch norm after it has one."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels, 3)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """`depth` = 6n + 2 layers: a stem, stages of n blocks (widths w, 2w, 4w), a classifier."""

    def __init__(
        self, depth: int = 8, width: int = 16, in_channels: int = 1, num_classes: int = 10
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 32, 44, 56, ...), got {depth}")
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            convolution(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stage1 = stage(blocks, width, width, stride=1)
        self.stage2 = stage(blocks, width, 2 * width, stride=2)
        self.stage3 = stage(blocks, 2 * width, 4 * width, stride=2)
        self.classifier = nn.Linear(4 * width, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # A ReLU halves the variance: with sqrt(2 / fan_out) that of the gradients stays the
                # same through the depth (He et al. 2015, arXiv:1502.01852).
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        # Logits near 0: the first loss is ln(K), whatever the features.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> logits (B, K)."""
        x = self.stem(image)  # (B, w, H, W)
        x = self.stage1(x)  # (B, w, H, W)
        x = self.stage2(x)  # (B, 2w, H/2, W/2)
        x = self.stage3(x)  # (B, 4w, H/4, W/4)
        x = x.mean(dim=(2, 3))  # (B, 4w)
        return self.classifier(x)  # (B, K)


def stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """`blocks` residual blocks, of which the first changes the resolution and the width."""
    first = ResidualBlock(in_channels, out_channels, stride)
    rest = [ResidualBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
