"""Decoder-only Transformer (Vaswani et al. 2017, arXiv:1706.03762; GPT-2, Radford 2019), and the block of all of them.

Shapes: B sequences, T tokens, S states attended to, V vocabulary, C model width (`dim`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.attention import Cache, CrossAttention, SelfAttention
from dist_train.models.chunked_cross_entropy import chunked_cross_entropy

NORMS = ("pre", "post")
POSITIONS = ("learned", "sinusoidal")


class Block(nn.Module):
    """Self-attention, attention to a memory if `cross`, then an MLP, each added to the residual stream. The MLP has
    GELU, as GPT-2 does, where the first Transformers had ReLU.

    `norm` "pre" normalises what enters each of them, "post" the stream after each sum, as the paper did.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dropout: float,
        mlp_ratio: int,
        norm: str = "pre",
        causal: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, dropout, causal)
        if cross:
            self.cross_norm = nn.LayerNorm(dim)
            self.cross_attention = CrossAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, mlp_ratio * dim)
        self.contract = nn.Linear(mlp_ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T, C), of which `mask` (B, 1, 1, T) is False at padding; memory (B, S, C) -> (B, T, C)."""
        post = self.norm == "post"
        y = self.attention(x if post else self.norm1(x), mask, cache)
        x = x + self.dropout(y)
        x = self.norm1(x) if post else x
        if memory is not None:
            y = x if post else self.cross_norm(x)
            x = x + self.dropout(self.cross_attention(y, memory, memory_mask, cache))
            x = self.cross_norm(x) if post else x
        hidden = F.gelu(self.expand(x if post else self.norm2(x)))  # (B, T, mlp_ratio C)
        x = x + self.dropout(self.contract(hidden))
        return self.norm2(x) if post else x


def sinusoids(start: int, length: int, dim: int, like: Tensor) -> Tensor:
    """Rows `start` to `start + length` of the paper's table, (T, C), of the type and device of `like`: sines and
    cosines side by side, of wavelengths from 2 pi to 20,000 pi."""
    place = torch.arange(start, start + length, device=like.device, dtype=torch.float32)
    even = torch.arange(0, dim, 2, device=like.device, dtype=torch.float32)
    angle = place[:, None] * torch.exp(even * (-math.log(10_000.0) / dim))  # (T, C / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)  # (T, C)


def placed(
    embedding: nn.Embedding, position: nn.Embedding | None, tokens: Tensor, start: int, limit: int
) -> Tensor:
    """Tokens (B, T), the first of which stands at `start` -> (B, T, C): embedded, with their positions added.

    Learned positions are rows of the table `position`. Without it they are sinusoids, and the embedding is multiplied
    by sqrt(C), so that neither drowns the other.
    """
    stop = start + tokens.shape[1]
    if stop > limit:
        raise ValueError(f"{stop} tokens, but the model has max_length {limit}")
    x = embedding(tokens)  # (B, T, C)
    if position is not None:
        return x + position.weight[start:stop]
    dim = x.shape[2]
    return x * dim**0.5 + sinusoids(start, tokens.shape[1], dim, x)


def check_arguments(dim: int, num_heads: int, dropout: float, norm: str, positions: str) -> None:
    """ValueError for what no Transformer can be built with."""
    if dim % num_heads != 0:
        raise ValueError(f"num_heads must divide dim, got dim {dim} and num_heads {num_heads}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "sinusoidal" and dim % 2:
        raise ValueError(f"dim must be even for sinusoidal positions, got {dim}")


def draw(model: nn.Module, dim: int, branches: int) -> None:
    """Draw a Transformer's weights from the default generator; `branches` are added up in its residual stream.

    GPT-2's 0.02 belongs to its width of 768: it is about 0.5 / sqrt(dim), which keeps the tied output's first logits
    small (the loss near ln(V)) and the signal alive at any width.
    """
    scale = 0.5 / dim**0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=scale)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    for name, weight in model.named_parameters():
        if name.endswith(("projection.weight", "contract.weight")):
            # The branches add up in the residual stream: their sum keeps the scale of one.
            nn.init.normal_(weight, std=scale / branches**0.5)


class Transformer(nn.Module):
    """A language model over `vocab_size` tokens and at most `max_length` positions.

    The embedding table is the output layer too (Press and Wolf 2017, arXiv:1608.05859): one
    parameter, `embedding.weight`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        max_length: int = 128,
        dropout: float = 0.0,
        mlp_ratio: int = 4,
        norm: str = "pre",
        positions: str = "learned",
    ) -> None:
        super().__init__()
        check_arguments(dim, num_heads, dropout, norm, positions)
        self.dim, self.max_length = dim, max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, dropout, mlp_ratio, norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim) if norm == "pre" else nn.Identity()
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator (`draw`)."""
        draw(self, self.dim, branches=2 * len(self.blocks))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        chunk: int = 0,
        state: dict[str, Cache] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Cache]]:
        """Tokens (B, T) int64 -> logits (B, T, V) of the next token; T is at most `max_length`.

        With `targets` (B, T) int64 and their `weights` (B, T) -> the weighted sum of the losses, a scalar, from the
        logits of `chunk` positions at a time. With a `state`, {} at the beginning: only the tokens that are new to it
        -> (logits (B, T, V), the next state), in which keys and values of the tokens so far are kept.
        """
        caches = {name: dict(cache) for name, cache in (state or {}).items()}
        before = caches["0"]["key"].shape[2] if caches else 0
        x = self.dropout(placed(self.embedding, self.position, tokens, before, self.max_length))
        for number, block in enumerate(self.blocks):
            cache = None if state is None else caches.setdefault(str(number), {})
            x = block(x, None, None, None, cache)
        x = self.norm(x)
        if targets is None or weights is None:
            logits = F.linear(x, self.embedding.weight)  # (B, T, V)
            return logits if state is None else (logits, caches)
        return chunked_cross_entropy(
            x.flatten(0, 1), self.embedding.weight, targets.flatten(), weights.flatten(), chunk
        )
