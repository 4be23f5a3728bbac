"""Sequence to sequence by LSTM (Sutskever et al. 2014, arXiv:1409.3215), with or without attention.

Shapes: B sequences, S source tokens, T target tokens, V vocabulary, C width (`dim`), L layers, N tensors of a state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.attention import Attention
from dist_train.models.recurrent import RecurrentLayer, initialise_recurrent

FEEDS = ("output", "layer", "step")


class Seq2Seq(nn.Module):
    """An encoder reads the source, a decoder that begins with the encoder's last state writes the target.

    One table embeds source and target and is the output layer too: the two share their tokens.

    Args:
        attention: "none", or the kind of `Attention` to the encoder's last layer.
        feed: where a context goes. "output": joined to the decoder's last state, before the logits; the query is that
            state (Luong). "layer": into the second layer; the query is the first layer's state. "step": into the first
            layer at the next step; the query is the last layer's state (Bahdanau).
        reverse: read the source from its end, so that the two beginnings are near each other.
        dropout: of what enters a layer, and of what enters the output.
        cell: "lstm", "gru" or "rnn".
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 2,
        attention: str = "none",
        feed: str = "output",
        reverse: bool = True,
        dropout: float = 0.0,
        cell: str = "lstm",
    ) -> None:
        super().__init__()
        if feed not in FEEDS:
            raise ValueError(f"feed must be one of {', '.join(FEEDS)}, got {feed!r}")
        if depth < 1 or (feed == "layer" and depth < 2):
            raise ValueError(f"depth must be 1 or more, and 2 for feed 'layer', got {depth}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dim = dim
        self.feed = feed if attention != "none" else ""
        self.embedding = nn.Embedding(vocab_size, dim)
        self.encoder = nn.ModuleList(
            RecurrentLayer(dim, dim, cell, backward=reverse) for _ in range(depth)
        )
        fed = {"layer": 1, "step": 0}.get(self.feed)
        self.decoder = nn.ModuleList(
            RecurrentLayer(2 * dim if layer == fed else dim, dim, cell) for layer in range(depth)
        )
        if self.feed:
            self.attention = Attention(attention, dim, dim, dim)
        if self.feed == "output":
            self.combine = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator."""
        # Of the tied table: half of what keeps the scale, so that the first logits are small.
        nn.init.normal_(self.embedding.weight, std=0.5 * self.dim**-0.5)
        nn.init.zeros_(self.bias)
        initialise_recurrent(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # of the attention: these keep the variance
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, source: Tensor, source_length: Tensor) -> dict[str, Tensor]:
        """Source (B, S), of which row b has `source_length[b]` tokens -> what the decoder begins with."""
        x = self._embed(source)  # (B, S, C)
        lasts = []
        for layer in self.encoder:
            x, last = layer(self.dropout(x), source_length)
            lasts.append(torch.stack(last, dim=1))  # (B, N, C)
        state = {"layers": torch.stack(lasts, dim=1)}  # (B, L, N, C)
        if self.feed:
            keys, values = self.attention.keys_and_values(x)  # (B, S, C)
            places = torch.arange(source.shape[1], device=source.device)
            state |= {"keys": keys, "values": values, "real": places < source_length[:, None]}
        if self.feed == "step":
            state["context"] = x.new_zeros(len(x), self.dim)  # (B, C)
        return state

    def forward(
        self,
        source: Tensor,
        source_length: Tensor,
        tokens: Tensor,
        state: dict[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Source (B, S), the number of its tokens (B,), target tokens (B, T) -> logits (B, T, V) of the next ones.

        With a `state`, {} at the beginning: only the tokens that are new to it -> (logits, the next state).
        """
        features, _, after = self._decode(tokens, state or self.encode(source, source_length))
        logits = F.linear(self.dropout(features), self.embedding.weight, self.bias)  # (B, T, V)
        return logits if state is None else (logits, after)

    def attention_weights(self, source: Tensor, source_length: Tensor, tokens: Tensor) -> Tensor:
        """How much each target token (B, T) looks at each source token: (B, T, S)."""
        if not self.feed:
            raise ValueError("attention is 'none', so there are no weights")
        return self._decode(tokens, self.encode(source, source_length))[1]

    def _embed(self, tokens: Tensor) -> Tensor:
        """As output the tied table is small; as input it is brought to the scale of the states."""
        return self.embedding(tokens) * self.dim**0.5

    def _decode(
        self, tokens: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(features (B, T, C), weights (B, T, S), the state after them)."""
        x = self._embed(tokens)  # (B, T, C)
        if self.feed != "step":
            return self._advance(x, state)
        features, weights = [], []
        for piece in x.split(1, dim=1):
            feature, weight, state = self._advance(piece, state)
            features.append(feature)
            weights.append(weight)
        return torch.cat(features, dim=1), torch.cat(weights, dim=1), state

    def _advance(
        self, x: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The decoder's layers over embedded tokens (B, T, C) that need no context but that of the state."""
        weights = x.new_zeros(())
        lasts = []
        for number, layer in enumerate(self.decoder):
            x = self.dropout(x)
            if self.feed == "step" and number == 0:
                x = torch.cat([x, state["context"][:, None]], dim=2)  # (B, 1, 2 C)
            if self.feed == "layer" and number == 1:
                context, weights = self._attend(x, state)
                x = torch.cat([x, context], dim=2)  # (B, T, 2 C)
            x, last = layer(x, None, state["layers"][:, number].unbind(dim=1))  # (B, T, C)
            lasts.append(torch.stack(last, dim=1))
        state = state | {"layers": torch.stack(lasts, dim=1)}
        if self.feed in ("output", "step"):
            context, weights = self._attend(x, state)
            if self.feed == "step":
                state["context"] = context.squeeze(1)
            else:
                x = torch.tanh(self.combine(torch.cat([x, context], dim=2)))  # (B, T, C)
        return x, weights, state

    def _attend(self, queries: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.attention(queries, state["keys"], state["values"], state["real"])
