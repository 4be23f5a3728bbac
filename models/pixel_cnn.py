"""PixelCNN: the probability of an image as a product over its sub-pixels, by masked convolutions with gates.

van den Oord et al. 2016, "Pixel recurrent neural networks", arXiv:1601.06759 (masks), and "Conditional image
generation with PixelCNN decoders", arXiv:1606.05328 (gates, two stacks, conditions).
Shapes: B samples, V levels, C channels, images H x W, w maps, K numbers of a condition.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.subpixels import (
    MaskedConvolution,
    State,
    bias_of,
    by_level,
    check_arguments,
    head,
    initialise,
    numbers_of_condition,
    place_of,
    vector_of,
)


class VerticalLayer(nn.Module):
    """Sees the rows above, without a mask: a stack of square masked kernels alone would have a blind spot above, to the
    right."""

    def __init__(self, in_maps: int, width: int, kernel: int, numbers: int) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.convolution = nn.Conv2d(in_maps, 2 * width, (self.reach + 1, kernel))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.condition = nn.Linear(numbers, 2 * width, bias=False) if numbers else None

    def forward(self, v: Tensor, vector: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, in, H, W) -> the next maps (B, w, H, W), and what goes across to the other stack (B, 2w, H, W)."""
        v = self.convolution(F.pad(v, (self.reach, self.reach, self.reach, 0)))  # (B, 2w, H, W)
        return gated(v, bias_of(self.condition, vector)), self.across(v)


class HorizontalLayer(nn.Module):
    """Sees the row to the left, and what the vertical stack says of those above."""

    def __init__(
        self, in_maps: int, width: int, kernel: int, channels: int, numbers: int, first: bool
    ) -> None:
        super().__init__()
        self.first = first
        self.convolution = MaskedConvolution(
            in_maps, 2 * width, (1, kernel), channels, own=not first, parts=2
        )
        self.output = MaskedConvolution(width, width, (1, 1), channels, own=True)
        self.condition = nn.Linear(numbers, 2 * width, bias=False) if numbers else None

    def forward(self, h: Tensor, across: Tensor, vector: Tensor | None) -> Tensor:
        """(B, in, H, W), of the vertical stack (B, 2w, H, W) -> (B, w, H, W)."""
        maps = self.convolution(h) + across  # (B, 2w, H, W)
        y = self.output(gated(maps, bias_of(self.condition, vector)))
        return y if self.first else h + y


class PixelCNN(nn.Module):
    """`depth` gated layers, then two masked 1 x 1 convolutions to the logits.

    Args:
        kernel: odd. levels: V. width: w, a multiple of the channels.
        num_classes: of a label as condition. context_dim: of a vector as condition; at most one of them is above 0.
    """

    def __init__(
        self,
        channels: int = 1,
        levels: int = 256,
        width: int = 24,
        depth: int = 5,
        kernel: int = 3,
        num_classes: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(channels, width, kernel, depth)
        self.levels, self.reach = levels, depth * (kernel // 2)
        self.num_classes, self.context_dim = num_classes, context_dim
        numbers = numbers_of_condition(num_classes, context_dim)
        maps = [channels, *[width] * (depth - 1)]
        # nothing takes what the last vertical layer's gates let through
        self.vertical = nn.ModuleList(
            VerticalLayer(m, width, kernel, numbers if i < depth - 1 else 0)
            for i, m in enumerate(maps)
        )
        self.horizontal = nn.ModuleList(
            HorizontalLayer(m, width, kernel, channels, numbers, first=i == 0)
            for i, m in enumerate(maps)
        )
        self.head = head(width, channels, levels)
        initialise(self)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        known: int | None = None,
        state: State | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Image (B, C, H, W) in [0, 1] -> logits (B, V, C, H, W) of each sub-pixel, given those before it.

        The condition is a label (B,) int64, or a vector (B, K). With a `state`, {} at first: the first `known`
        sub-pixels are settled -> the logits of the next (B, V), and the next state.
        """
        vector = vector_of(condition, self.num_classes, self.context_dim, x)
        x = 2 * x - 1  # so that black is not what lies outside
        if known is None or state is None:
            h = self._along(x, self._down(x, vector), vector)
            return by_level(self.head(h), self.levels)
        row, column, channel = place_of(known, x.shape)
        if state.get("row") != row:  # the vertical stack says the same to the whole row
            across = self._down(x[:, :, : row + 1], vector)
            state = {"row": row, "across": [maps[:, :, -1:] for maps in across]}
        near = slice(max(0, column - self.reach), column + 1)  # all that the next sub-pixel sees
        said = [maps[:, :, :, near] for maps in state["across"]]
        h = self._along(x[:, :, row : row + 1, near], said, vector)[:, :, :, -1:]  # (B, w, 1, 1)
        return by_level(self.head(h), self.levels)[:, :, channel, 0, 0], state

    def _down(self, x: Tensor, vector: Tensor | None) -> list[Tensor]:
        """What each layer of the vertical stack says, (B, 2w, H, W): of a row, what is above it."""
        v, said = F.pad(x, (0, 0, 1, 0))[:, :, :-1], []  # each row one down
        for layer in self.vertical:
            v, across = layer(v, vector)
            said.append(across)
        return said

    def _along(self, x: Tensor, said: list[Tensor], vector: Tensor | None) -> Tensor:
        """(B, C, H, W) -> the maps of the horizontal stack (B, w, H, W)."""
        for layer, across in zip(self.horizontal, said, strict=True):
            x = layer(x, across, vector)
        return x


def gated(x: Tensor, bias: Tensor | None) -> Tensor:
    """tanh(a + b) sigmoid(c + d), of maps (B, 2w, H, W) = (a, c) and the condition's (B, 2w, 1, 1) = (b, d)."""
    value, gate = (x if bias is None else x + bias).chunk(2, dim=1)
    return value.tanh() * gate.sigmoid()
