"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition").

As taught today: all 6 maps feed all 16, and a linear layer with softmax stands for the RBF units.
Shapes: B images, C channels, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import activation_of

SIZE = 32
"""The paper pads its 28-pixel digits to this, so that strokes reach the middle of a receptive field."""


class LeNet(nn.Module):
    """Two convolutions, each halved by pooling, then three linear layers."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if not 1 <= image_size <= SIZE:
            raise ValueError(f"image_size must be at most {SIZE}, got {image_size}")
        spare = SIZE - image_size
        self.padding = (spare // 2, spare - spare // 2) * 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(16 * 5 * 5, 120)
        self.linear2 = nn.Linear(120, 84)
        self.classifier = nn.Linear(84, num_classes)
        self.activation = activation_of(activation)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # Keeps the variance of signal and gradient through a tanh near 0 (Glorot 2010).
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Logits near 0: the first loss is ln(K), whatever the features.
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, S, S) with S at most 32 -> logits (B, K)."""
        x = F.pad(image, self.padding)  # (B, C, 32, 32)
        x = self.activation(self.conv1(x))  # (B, 6, 28, 28)
        x = F.avg_pool2d(x, 2)  # (B, 6, 14, 14)
        x = self.activation(self.conv2(x))  # (B, 16, 10, 10)
        x = F.avg_pool2d(x, 2)  # (B, 16, 5, 5)
        x = self.activation(self.linear1(x.flatten(1)))  # (B, 120)
        x = self.activation(self.linear2(x))  # (B, 84)
        return self.classifier(x)  # (B, K)
