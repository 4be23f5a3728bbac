"""Attention of a sequence to the states of another (Bahdanau et al. 2015, arXiv:1409.0473; Luong et al. 2015,
arXiv:1508.04025), and multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

Shapes: B sequences, T queries, S states, Q width of a query, M width of a state, C width of keys and values, H heads,
D = C / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ("identity", "multiplicative", "additive")
Cache = dict[str, Tensor]
"""Keys and values of the tokens so far, and of the memory: each (B, H, S, D)."""


class Attention(nn.Module):
    """The mean of learned values of the states, weighted by how well their keys fit the query.

    Args:
        kind: the score of a query q and a state h. "identity": q . h, both as they are. "multiplicative":
            (A q) . (B h) / sqrt(C), linear queries and keys. "additive": v . tanh(A q + B h).
    """

    def __init__(self, kind: str, query_dim: int, state_dim: int, dim: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"attention must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "identity" and query_dim != state_dim:
            raise ValueError(
                f"identity attention needs queries and states of one width, got {query_dim} and {state_dim}"
            )
        self.kind = kind
        learned = kind != "identity"
        self.query = nn.Linear(query_dim, dim, bias=False) if learned else nn.Identity()
        self.key = nn.Linear(state_dim, dim, bias=kind == "additive") if learned else nn.Identity()
        self.score = nn.Linear(dim, 1, bias=False) if kind == "additive" else nn.Identity()
        self.value = nn.Linear(state_dim, dim, bias=False)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, M) -> their keys (B, S, C or M) and values (B, S, C), which no query changes."""
        return self.key(states), self.value(states)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, T, Q) -> contexts (B, T, C) and weights (B, T, S), 0 where `real` (B, S) is False."""
        queries = self.query(queries)  # (B, T, C)
        if self.kind == "additive":
            scores = self.score(torch.tanh(queries[:, :, None] + keys[:, None])).squeeze(3)
        else:
            scores = queries @ keys.transpose(1, 2)  # (B, T, S)
            if self.kind == "multiplicative":
                scores = scores / keys.shape[-1] ** 0.5
        weights = scores.masked_fill(~real[:, None], -torch.inf).softmax(dim=-1)  # (B, T, S)
        return weights @ values, weights


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to their own sequence; if `causal`, to themselves and what stands before."""

    def __init__(self, dim: int, num_heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.dropout = dropout
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """(B, T, C), of which `mask` (B, 1, 1, T) is False at padding -> (B, T, C); `cache` has what stood before."""
        batch, length, _ = x.shape
        x = self.query_key_value(x).view(batch, length, 3, self.num_heads, -1)  # (B, T, 3, H, D)
        query, key, value = x.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        before = 0
        if cache is not None:
            if "key" in cache:
                before = cache["key"].shape[2]
                key = torch.cat([cache["key"], key], dim=2)
                value = torch.cat([cache["value"], value], dim=2)
            cache["key"], cache["value"] = key, value
        if before and length > 1:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=x.device)
            mask = mask.tril(diagonal=before)
        causal = self.causal and not before
        y = _attend(query, key, value, mask, self.dropout if self.training else 0.0, causal)
        return self.projection(y)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the states of another sequence."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, C) and memory (B, S, C), with `mask` (B, 1, 1, S) False at padding -> (B, T, C)."""
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        if cache is None or "memory_key" not in cache:
            pair = self.key_value(memory).view(batch, memory.shape[1], 2, self.num_heads, -1)
            key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, S, D)
            if cache is not None:
                cache["memory_key"], cache["memory_value"] = key, value
        else:
            key, value = cache["memory_key"], cache["memory_value"]
        y = _attend(query, key, value, mask, self.dropout if self.training else 0.0, causal=False)
        return self.projection(y)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of each head, side by side: (B, H, T, D) -> (B, T, C)."""
    y = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )
    return y.transpose(1, 2).flatten(2)
