"""Decoder-only pre-norm Transformer (Vaswani et al. 2017, arXiv:1706.03762; GPT-2, Radford 2019).

Shapes: B sequences, T tokens, V vocabulary, C model width (`dim`), H heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.chunked_cross_entropy import chunked_cross_entropy


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what stands before it."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, length, dim = x.shape
        x = self.query_key_value(x).view(batch, length, 3, self.num_heads, -1)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.projection(y.transpose(1, 2).reshape(batch, length, dim))  # (B, T, C)


class Block(nn.Module):
    """Attention, then an MLP, each on normalised input and added to the residual stream."""

    def __init__(self, dim: int, num_heads: int, dropout: float, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, mlp_ratio * dim)
        self.contract = nn.Linear(mlp_ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        hidden = F.gelu(self.expand(self.norm2(x)))  # (B, T, mlp_ratio C)
        return x + self.dropout(self.contract(hidden))


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
    ) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, got dim {dim} and num_heads {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dim, self.max_length = dim, max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator.

        GPT-2's 0.02 belongs to its width of 768: it is about 0.5 / sqrt(dim), which keeps the tied head's first logits
        small (the loss near ln(V)) and the signal alive at any width.
        """
        scale = 0.5 / self.dim**0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=scale)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                # 2 depth branches add up in the residual stream: their sum keeps the scale of one.
                std = scale / (2 * len(self.blocks)) ** 0.5
                nn.init.normal_(module.attention.projection.weight, std=std)
                nn.init.normal_(module.contract.weight, std=std)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        chunk: int = 0,
    ) -> Tensor:
        """Tokens (B, T) int64 -> logits (B, T, V) of the next token; T is at most `max_length`.

        With `targets` (B, T) int64 and their `weights` (B, T) -> the weighted sum of the losses, a scalar, from the
        logits of `chunk` positions at a time.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} tokens, but the model has max_length {self.max_length}")
        x = self.dropout(self.embedding(tokens) + self.position.weight[:length])  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None or weights is None:
            return F.linear(x, self.embedding.weight)  # (B, T, V)
        return chunked_cross_entropy(
            x.flatten(0, 1), self.embedding.weight, targets.flatten(), weights.flatten(), chunk
        )


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    count: int,
    *,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Continue `tokens` (B, T) by `count` sampled tokens: (B, T + count) int64.

    `model` maps tokens to logits as `Transformer` does, in evaluation mode, and sees the last
    `max_length` tokens. Draws come from the default generator. `temperature` 0 takes the likeliest
    token; `top_k` draws among the k likeliest.
    """
    if tokens.shape[1] == 0:
        raise ValueError("generate needs at least one token to continue")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, got {top_k}")
    for _ in range(count):
        logits = model(tokens[:, -max_length:])[:, -1]  # (B, V)
        if temperature == 0:
            chosen = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = logits.float() / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
                logits = logits.masked_fill(logits < least, -torch.inf)
            chosen = torch.multinomial(logits.softmax(dim=-1), num_samples=1)  # (B, 1)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens
