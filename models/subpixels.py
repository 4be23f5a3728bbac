"""What models of one sub-pixel after the other share: their order, masked convolutions, conditions.

van den Oord et al. 2016, arXiv:1601.06759 and 1606.05328. Sub-pixels come row by row, in a row from left to right,
in a pixel R, then G, then B; each sees those before it.
Shapes: B samples, V levels, C channels, images H x W, w maps, K numbers of a condition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Any]
"""What was computed for the sub-pixels so far, and serves the next."""


class MaskedConvolution(nn.Conv2d):
    """A same-padded convolution whose kernel is open above the centre, and left of it in its row.

    The maps belong to the C channels, in equal parts. At the centre those of a channel see the maps of the channels
    before it (mask A), and with `own` also those of its own (mask B). `parts`: the outputs are so many such sets.
    """

    mask: Tensor

    def __init__(
        self,
        in_maps: int,
        out_maps: int,
        kernel: tuple[int, int],
        channels: int,
        own: bool,
        parts: int = 1,
    ) -> None:
        rows, columns = kernel[0] // 2, kernel[1] // 2
        super().__init__(in_maps, out_maps, kernel, padding=(rows, columns))
        of_input = torch.arange(in_maps) * channels // in_maps
        of_output = (torch.arange(out_maps // parts) * channels * parts // out_maps).repeat(parts)
        mask = torch.ones_like(self.weight.detach())
        mask[:, :, rows + 1 :] = 0
        mask[:, :, rows, columns + 1 :] = 0
        before = of_input[None] < of_output[:, None] + int(own)  # (out, in)
        mask[:, :, rows, columns] = before.to(mask)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def head(width: int, channels: int, levels: int) -> nn.Sequential:
    """Maps (B, w, H, W) -> logits (B, C V, H, W), through masks B."""
    return nn.Sequential(
        nn.ReLU(),
        MaskedConvolution(width, width, (1, 1), channels, own=True),
        nn.ReLU(),
        MaskedConvolution(width, channels * levels, (1, 1), channels, own=True),
    )


def by_level(logits: Tensor, levels: int) -> Tensor:
    """(B, C V, H, W) -> (B, V, C, H, W)."""
    return logits.unflatten(1, (-1, levels)).transpose(1, 2)


def place_of(number: int, shape: torch.Size) -> tuple[int, int, int]:
    """Row, column and channel of a sub-pixel by its number, in an image (B, C, H, W)."""
    pixel, channel = divmod(number, shape[1])
    row, column = divmod(pixel, shape[3])
    return row, column, channel


def numbers_of_condition(num_classes: int, context_dim: int) -> int:
    """K. ValueError where there are two conditions."""
    if min(num_classes, context_dim) < 0 or (num_classes and context_dim):
        raise ValueError(
            f"give num_classes or context_dim, 0 or more, got {num_classes} and {context_dim}"
        )
    return num_classes + context_dim


def vector_of(
    condition: Tensor | None, num_classes: int, context_dim: int, like: Tensor
) -> Tensor | None:
    """A label (B,) as one-hot (B, K) of the type of `like`, a context (B, K) as it is, nothing without a condition."""
    numbers = num_classes + context_dim
    if (condition is None) != (numbers == 0):
        raise ValueError(
            f"num_classes is {num_classes} and context_dim {context_dim}, but the condition is {condition!r:.40}"
        )
    if condition is None:
        return None
    return F.one_hot(condition, num_classes).to(like) if num_classes else condition


def bias_of(layer: nn.Linear | None, vector: Tensor | None) -> Tensor | None:
    """What the condition (B, K) adds in the gates of a layer: (B, 2w, 1, 1)."""
    return None if layer is None or vector is None else layer(vector)[:, :, None, None]


def check_arguments(channels: int, width: int, kernel: int, depth: int) -> None:
    """ValueError for what no masked network can be built with."""
    if width % channels != 0:
        raise ValueError(
            f"width must be a multiple of the channels, got {width} for {channels} channels"
        )
    if kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, got {kernel}")
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth}")


def initialise(model: nn.Module) -> None:
    """Draw the weights from the default generator: each output has the variance of an input, of what its mask lets
    through; and 0 in the last layer, so that all levels are equally likely at first."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            mask = module.mask if isinstance(module, MaskedConvolution) else None
            fan_in = module.weight[0].numel()
            share = 1.0 if mask is None else float(mask.mean())
            nn.init.normal_(module.weight, std=(max(fan_in * share, 1.0)) ** -0.5)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight)
