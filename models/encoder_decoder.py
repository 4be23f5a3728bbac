"""Encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762).

Shapes: B sequences, S source tokens, T target tokens, V vocabulary, C model width (`dim`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.attention import Cache
from dist_train.models.transformer import Block, check_arguments, draw, placed


class EncoderDecoder(nn.Module):
    """The source attends to itself, the target to what was written before and to the encoded source.

    One table embeds source and target and is the output layer too: the two share their tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_length: int = 128,
        dropout: float = 0.0,
        mlp_ratio: int = 4,
        norm: str = "pre",
        positions: str = "sinusoidal",
    ) -> None:
        super().__init__()
        check_arguments(dim, num_heads, dropout, norm, positions)
        self.dim, self.max_length = dim, max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        learned = positions == "learned"
        self.source_position = nn.Embedding(max_length, dim) if learned else None
        self.target_position = nn.Embedding(max_length, dim) if learned else None
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(
            Block(dim, num_heads, dropout, mlp_ratio, norm, causal=False) for _ in range(depth)
        )
        self.decoder = nn.ModuleList(
            Block(dim, num_heads, dropout, mlp_ratio, norm, cross=True) for _ in range(depth)
        )
        pre = norm == "pre"
        self.encoder_norm = nn.LayerNorm(dim) if pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(dim) if pre else nn.Identity()
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator (`draw`)."""
        draw(self, self.dim, branches=3 * len(self.decoder))
        nn.init.zeros_(self.bias)

    def encode(self, source: Tensor, mask: Tensor) -> Tensor:
        """Source (B, S) and its mask (B, 1, 1, S), False at padding -> (B, S, C)."""
        x = placed(self.embedding, self.source_position, source, 0, self.max_length)  # (B, S, C)
        x = self.dropout(x)
        for block in self.encoder:
            x = block(x, mask)
        return self.encoder_norm(x)

    def forward(
        self,
        source: Tensor,
        source_length: Tensor,
        tokens: Tensor,
        state: dict[str, Cache] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Cache]]:
        """Source (B, S), the number of its tokens (B,), target tokens (B, T) -> logits (B, T, V) of the next ones.

        With a `state`, {} at the beginning: only the tokens that are new to it -> (logits, the next state), in which
        the encoded source and the keys and values of the tokens so far are kept.
        """
        caches = {name: dict(cache) for name, cache in (state or {}).items()}
        if caches:
            memory, mask = caches["source"]["memory"], caches["source"]["mask"]
            before = caches["0"]["key"].shape[2]
        else:
            place = torch.arange(source.shape[1], device=source.device)  # (S,)
            mask = (place < source_length[:, None])[:, None, None]  # (B, 1, 1, S)
            memory, before = self.encode(source, mask), 0
            caches["source"] = {"memory": memory, "mask": mask}
        x = placed(self.embedding, self.target_position, tokens, before, self.max_length)
        x = self.dropout(x)  # (B, T, C)
        for number, block in enumerate(self.decoder):
            cache = None if state is None else caches.setdefault(str(number), {})
            x = block(x, None, memory, mask, cache)
        logits = F.linear(self.decoder_norm(x), self.embedding.weight, self.bias)  # (B, T, V)
        return logits if state is None else (logits, caches)
