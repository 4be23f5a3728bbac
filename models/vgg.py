"""VGG: 3x3 convolutions and nothing else (Simonyan and Zisserman 2014, arXiv:1409.1556, table 1).

Shapes: B images, C channels, S x S pixels, w width, R resolution of the last maps, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import chosen, convolution, norm_of

DEPTHS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions in each stage, by the number of layers with weights: columns A, B, D, E of the table."""
WIDTHS = (1, 2, 4, 8, 8)
"""Channels of each stage, in units of `width`."""


class VGG(nn.Module):
    """Five stages of convolutions, each halved by pooling, then three linear layers.

    A small image is halved as long as there is something to halve: 28 pixels 14, 7, 3, 1.
    """

    def __init__(
        self,
        depth: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        image_size: int = 224,
        width: int = 64,
        hidden: int = 4096,
        norm: str = "none",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        counts = chosen(DEPTHS, depth, "depth")
        if image_size < 1:
            raise ValueError(f"image_size must be 1 or more, got {image_size}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        stages, channels, resolution = [], in_channels, image_size
        for count, factor in zip(counts, WIDTHS, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers.append(convolution(channels, factor * width, 3, bias=norm == "none"))
                layers += [norm_of(norm, factor * width), nn.ReLU()]
                channels = factor * width
            if resolution > 1:
                layers.append(nn.MaxPool2d(2))
                resolution //= 2
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.hidden1 = nn.Linear(channels * resolution**2, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # The paper trained shallow nets first to start the deep ones; with sqrt(2 / fan_in)
                # there is no need to (He et al. 2015, arXiv:1502.01852).
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Logits near 0: the first loss is ln(K), whatever the features.
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) -> logits (B, K)."""
        x = self.stages(image)  # (B, 8w, R, R)
        x = self.dropout(F.relu(self.hidden1(x.flatten(1))))  # (B, hidden)
        x = self.dropout(F.relu(self.hidden2(x)))  # (B, hidden)
        return self.classifier(x)  # (B, K)
