"""Sequence to sequence by LSTM (Sutskever et al. 2014, arXiv:1409.3215), with or without attention.

Shapes: B sequences, S source tokens, T target tokens, V vocabulary, C width (`dim`), L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.attention import Attention

FEEDS = ("output", "layer", "step")


class Seq2Seq(nn.Module):
    """An encoder reads the source, a decoder that begins with the encoder's last state writes the target.

    One table embeds source and target and is the output layer too: the two share their tokens.

    Args:
        attention: "none", or the kind of `Attention` to the encoder's last layer.
        feed: where a context goes. "output": joined to the decoder's last state, before the logits, whose query that
            state is (Luong). "layer": into the second layer, and the first layer's state is the query. "step": into
            the first layer at the next step, and the last layer's state is the query (Bahdanau).
        reverse: read the source from its end, so that the two beginnings are near each other.
        dropout: of what enters a layer, and of what enters the output.
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
    ) -> None:
        super().__init__()
        if feed not in FEEDS:
            raise ValueError(f"feed must be one of {', '.join(FEEDS)}, got {feed!r}")
        if depth < 1 or (feed == "layer" and depth < 2):
            raise ValueError(f"depth must be 1 or more, and 2 for feed 'layer', got {depth}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dim, self.depth, self.reverse = dim, depth, reverse
        self.feed = feed if attention != "none" else ""
        self.embedding = nn.Embedding(vocab_size, dim)
        # Without biases: see `encode`.
        self.encoder = nn.ModuleList(
            nn.LSTM(dim + 1, dim, bias=False, batch_first=True) for _ in range(depth)
        )
        fed = {"layer": 1, "step": 0}.get(self.feed)
        self.decoder = nn.ModuleList(
            nn.LSTM(2 * dim if layer == fed else dim, dim, batch_first=True)
            for layer in range(depth)
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
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Of the tied table: half of what keeps the scale, so that the first logits are small.
                fan_in = 4 * self.dim if name == "embedding.weight" else weight.shape[1]
                nn.init.normal_(weight, std=fan_in**-0.5)
            else:
                nn.init.zeros_(weight)
        # A forget gate that begins open lets gradients through time (Jozefowicz et al. 2015).
        forget = slice(self.dim, 2 * self.dim)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.startswith("encoder.") and name.endswith("weight_ih_l0"):
                    weight[:, -1] = 0.0
                    weight[forget, -1] = 1.0
                elif name.endswith("bias_ih_l0"):
                    weight[forget] = 1.0

    def encode(self, source: Tensor, source_length: Tensor) -> dict[str, Tensor]:
        """Source (B, S), of which row b has `source_length[b]` tokens -> what the decoder begins with.

        Rows are brought to the right, behind their padding. Zeros then keep a zero state of an LSTM without biases at
        zero exactly, so padding changes nothing; the biases are the weights of a column that is 1 for real tokens.
        """
        place = self._read_order(source, source_length)
        real = place >= 0
        x = self._embed(source.gather(1, place.clamp(min=0)))  # (B, S, C)
        ones = real[:, :, None].to(x.dtype)
        last = []
        for layer in self.encoder:
            # (B, S, C + 1) -> (B, S, C)
            x, state = layer(torch.cat([self.dropout(x) * ones, ones], dim=2))
            last.append(state)
        state = {
            "hidden": torch.stack([h.squeeze(0) for h, _ in last], dim=1),  # (B, L, C)
            "cell": torch.stack([c.squeeze(0) for _, c in last], dim=1),
        }
        if self.feed:
            keys, values = self.attention.keys_and_values(x)  # (B, S, C)
            state |= {"keys": keys, "values": values, "real": real}
        if self.feed == "step":
            state["context"] = torch.zeros_like(state["hidden"][:, 0])  # (B, C)
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
        _, weights, _ = self._decode(tokens, self.encode(source, source_length))
        place = self._read_order(source, source_length).clamp(min=0)  # padding weighs 0
        index = place[:, None].expand_as(weights)
        return torch.zeros_like(weights).scatter_add(2, index, weights)

    def _embed(self, tokens: Tensor) -> Tensor:
        """As output the tied table is small; as input it is brought to the scale of the states."""
        return self.embedding(tokens) * self.dim**0.5

    def _read_order(self, source: Tensor, source_length: Tensor) -> Tensor:
        """Which place of the source is read at each step, negative where it is padding: (B, S)."""
        width = source.shape[1]
        steps = torch.arange(width, device=source.device)
        if self.reverse:
            place = (width - 1 - steps).expand_as(source)
            return place.masked_fill(place >= source_length[:, None], -1)
        return steps - (width - source_length[:, None])

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
        """The decoder's layers over embedded tokens (B, T, C) that need no context but the first of them."""
        weights = x.new_zeros(())
        after = []
        for number, layer in enumerate(self.decoder):
            x = self.dropout(x)
            if self.feed == "step" and number == 0:
                x = torch.cat([x, state["context"][:, None]], dim=2)  # (B, 1, 2 C)
            if self.feed == "layer" and number == 1:
                context, weights = self._attend(x, state)
                x = torch.cat([x, context], dim=2)  # (B, T, 2 C)
            begin = (
                state["hidden"][:, number][None].contiguous(),
                state["cell"][:, number][None].contiguous(),
            )
            x, (hidden, cell) = layer(x, begin)  # (B, T, C)
            after.append((hidden.squeeze(0), cell.squeeze(0)))
        state = state | {
            "hidden": torch.stack([hidden for hidden, _ in after], dim=1),
            "cell": torch.stack([cell for _, cell in after], dim=1),
        }
        if self.feed in ("output", "step"):
            context, weights = self._attend(x, state)
            if self.feed == "step":
                state["context"] = context.squeeze(1)
            else:
                x = torch.tanh(self.combine(torch.cat([x, context], dim=2)))  # (B, T, C)
        return x, weights, state

    def _attend(self, queries: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.attention(queries, state["keys"], state["values"], state["real"])
