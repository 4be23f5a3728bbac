"""AlexNet (Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep CNNs").

The paper's two GPUs are two columns of half the channels each, which see each other's maps only before the third
convolution and the linear layers. Here the columns are the network, and which device holds a column is the recipe's
`placement: {column2: 1}`.
Shapes: B images, C channels, S x S pixels, w width (channels of a column's first maps), K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import chosen

STEMS: dict[str, tuple[int, int, int]] = {
    "imagenet": (11, 4, 2),  # 224 -> 55
    "small": (5, 2, 2),  # 64 -> 32
}
"""(kernel, stride, padding) of the first convolution."""


class Join(nn.Module):
    """The maps of both columns, one after the other: where a column needs the other's."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(B, N, ...) and (B, N, ...) -> (B, 2N, ...)."""
        return torch.cat([first, second], dim=1)


class Column(nn.Module):
    """Half of the network: what one of the two GPUs of 2012 held."""

    def __init__(
        self, stem: tuple[int, int, int], in_channels: int, width: int, resolution: int, hidden: int
    ) -> None:
        super().__init__()
        kernel, stride, padding = stem
        w = width
        self.conv1 = nn.Conv2d(in_channels, w, kernel, stride, padding)
        self.conv2 = nn.Conv2d(w, 8 * w // 3, 5, padding=2)
        self.join2 = Join()
        self.conv3 = nn.Conv2d(16 * w // 3, 4 * w, 3, padding=1)
        self.conv4 = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.conv5 = nn.Conv2d(4 * w, 8 * w // 3, 3, padding=1)
        self.join5 = Join()
        self.linear6 = nn.Linear(16 * w // 3 * resolution**2, hidden)
        self.join6 = Join()
        self.linear7 = nn.Linear(2 * hidden, hidden)
        # k = 2, n = 5, alpha = 1e-4, beta = 0.75 (section 3.3); torch divides its alpha by n.
        self.normalise = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        self.pool = nn.MaxPool2d(3, stride=2)

    def maps2(self, image: Tensor) -> Tensor:
        """Image -> maps of the second convolution, pooled. The sizes are those of 224 pixels."""
        x = self.pool(self.normalise(F.relu(self.conv1(image))))  # (B, w, 55, 55) -> 27
        return self.pool(self.normalise(F.relu(self.conv2(x))))  # (B, 8w/3, 27, 27) -> 13

    def maps5(self, mine: Tensor, other: Tensor) -> Tensor:
        """Both columns' second maps, as `join2` orders them -> maps of the fifth convolution, pooled."""
        x = F.relu(self.conv3(self.join2(mine, other)))  # (B, 4w, 13, 13)
        x = F.relu(self.conv4(x))  # (B, 4w, 13, 13)
        return self.pool(F.relu(self.conv5(x)))  # (B, 8w/3, 13, 13) -> 6


class AlexNet(nn.Module):
    """Two columns of five convolutions and two linear layers, then a classifier over both."""

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        image_size: int = 224,
        stem: str = "imagenet",
        width: int = 48,
        hidden: int = 2048,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if width < 3 or width % 3:
            raise ValueError(f"width must be a multiple of 3 (48 in 2012), got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        kernel, stride, padding = chosen(STEMS, stem, "stem")
        resolution = (image_size + 2 * padding - kernel) // stride + 1
        for _ in range(3):
            resolution = (resolution - 3) // 2 + 1
        if resolution < 1:
            raise ValueError(f"image_size {image_size} is too small for three poolings")
        self.column1 = Column(STEMS[stem], in_channels, width, resolution, hidden)
        self.column2 = Column(STEMS[stem], in_channels, width, resolution, hidden)
        self.dropout = nn.Dropout(dropout)
        self.join7 = Join()
        self.classifier = nn.Linear(2 * hidden, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator.

        The paper's Gaussian of 0.01 belongs to its size; sqrt(2 / fan_in) keeps the signal at any (arXiv:1502.01852).
        Biases begin at 0; in the paper those of convolutions 2, 4 and 5 and of the hidden layers do at 1.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Logits near 0: the first loss is ln(K), whatever the features.
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) -> logits (B, K)."""
        a, b = self.column1, self.column2
        first, second = a.maps2(image), b.maps2(image)
        first, second = a.maps5(first, second), b.maps5(first, second)
        first, second = self.dropout(first.flatten(1)), self.dropout(second.flatten(1))
        first, second = (
            F.relu(a.linear6(a.join5(first, second))),
            F.relu(b.linear6(b.join5(first, second))),
        )
        first, second = self.dropout(first), self.dropout(second)
        first, second = (
            F.relu(a.linear7(a.join6(first, second))),
            F.relu(b.linear7(b.join6(first, second))),
        )
        return self.classifier(self.join7(first, second))  # (B, K)
