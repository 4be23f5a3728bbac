"""Networks: single-device PyTorch, nothing else."""

import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Two layers on flattened images: (B, C, S, S) -> logits (B, K)."""

    def __init__(self, channels: int, image_size: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(channels * image_size**2, width)
        self.last = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.first(images.flatten(1)))  # (B, C, S, S) -> (B, width)
        return self.last(hidden)  # (B, width) -> (B, K)
