"""PixelTransformer: a causal Transformer over the sub-pixels of an image, row by row, in a pixel R, then G, then B.

As Parmar et al. 2018, "Image Transformer", arXiv:1802.05751, but with attention to all that came before; a place is the
sum of its row, column and channel, as in Child et al. 2019, arXiv:1904.10509.
Shapes: B samples, V levels, C channels, images S x S, T = S S C sub-pixels, D model width (`dim`), K of a condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.models.subpixels import State, numbers_of_condition, vector_of
from dist_train.models.transformer import Block, check_arguments, draw


class PixelTransformer(nn.Module):
    """The input at each place is the sub-pixel before it, at the first a vector of its own; a condition joins all.

    Args: those of `PixelCNN` and of `Transformer`.
    """

    def __init__(
        self,
        channels: int = 1,
        image_size: int = 28,
        levels: int = 256,
        dim: int = 64,
        depth: int = 3,
        num_heads: int = 4,
        dropout: float = 0.0,
        mlp_ratio: int = 4,
        num_classes: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(dim, num_heads, dropout, "pre", "learned")
        self.channels, self.image_size, self.levels = channels, image_size, levels
        self.num_classes, self.context_dim = num_classes, context_dim
        numbers = numbers_of_condition(num_classes, context_dim)
        self.embedding = nn.Embedding(levels, dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.row, self.column = nn.Embedding(image_size, dim), nn.Embedding(image_size, dim)
        self.channel = nn.Embedding(channels, dim)
        self.condition = nn.Linear(numbers, dim) if numbers else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, levels)
        draw(self, dim, branches=2 * depth)
        nn.init.normal_(self.start, std=0.5 / dim**0.5)  # as an embedding
        nn.init.zeros_(self.output.weight)  # all levels are equally likely at first

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        known: int | None = None,
        state: State | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """As `PixelCNN.forward`, of images (B, C, S, S) whose values are levels k / (V - 1)."""
        vector = vector_of(condition, self.num_classes, self.context_dim, x)
        level = (x * (self.levels - 1)).round().long()
        level = level.permute(0, 2, 3, 1).flatten(1)  # (B, C, S, S) -> (B, T)
        if known is None or state is None:
            y = self._through(self._inputs(level, 0, level.shape[1], vector), None)
            logits = self.output(y).unflatten(1, (x.shape[2], x.shape[3], -1))  # (B, S, S, C, V)
            return logits.permute(0, 4, 3, 1, 2)
        caches = {name: dict(cache) for name, cache in state.get("caches", {}).items()}
        inputs = self._inputs(level, state.get("seen", 0), known + 1, vector)
        logits = self.output(self._through(inputs, caches)[:, -1])  # (B, V)
        return logits, {"seen": known + 1, "caches": caches}

    def _inputs(self, level: Tensor, begin: int, end: int, vector: Tensor | None) -> Tensor:
        """What enters at the places from `begin` to `end`: levels (B, T) -> (B, end - begin, D)."""
        before = self.embedding(level[:, max(begin - 1, 0) : end - 1])
        if begin == 0:
            before = torch.cat([self.start.expand(len(level), 1, -1), before], dim=1)
        place = torch.arange(begin, end, device=level.device)
        pixel = place // self.channels
        row, column = pixel // self.image_size, pixel % self.image_size
        x = before + self.row(row) + self.column(column) + self.channel(place % self.channels)
        if self.condition is not None and vector is not None:
            x = x + self.condition(vector)[:, None]
        return self.dropout(x)

    def _through(self, x: Tensor, caches: dict[str, dict[str, Tensor]] | None) -> Tensor:
        """(B, t, D) -> (B, t, D), after what the caches hold, which they then hold too."""
        for number, block in enumerate(self.blocks):
            cache = None if caches is None else caches.setdefault(str(number), {})
            x = block(x, None, None, None, cache)
        return self.norm(x)
