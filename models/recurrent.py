"""Recurrent networks, their cells written out: the vanilla RNN (Elman 1990), the LSTM (Hochreiter and Schmidhuber 1997,
with the forget gate of Gers et al. 2000) and the GRU (Cho et al. 2014, arXiv:1406.1078).

Shapes: B sequences, T steps, I inputs, C width of a state, G gates, L layers, D directions, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import chosen

State = tuple[Tensor, ...]
"""The hidden state, and of an LSTM its cell."""


def rnn_step(x: Tensor, h: Tensor, state: State) -> State:
    """h' = tanh(x + h)."""
    return (torch.tanh(x + h),)


def lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    """i, f, o = sigmoid(x + h) and g = tanh(x + h), each with its own weights; c' = f c + i g; h' = o tanh(c')."""
    i, f, g, o = (x + h).chunk(4, dim=1)  # each (B, C)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_step(x: Tensor, h: Tensor, state: State) -> State:
    """r, z = sigmoid(x + h); n = tanh(x + r h); h' = (1 - z) n + z h, the r on h's whole term as in cuDNN."""
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, dim=1), h.chunk(3, dim=1)
    keep = torch.sigmoid(xz + hz)
    new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    return ((1 - keep) * new + keep * state[0],)


@dataclass(frozen=True)
class Cell:
    """One step: of W x + b (B, G C), U h + c (B, G C) and the state, the next state."""

    step: Callable[[Tensor, Tensor, State], State]
    gates: int
    states: int


CELLS = {"rnn": Cell(rnn_step, 1, 1), "lstm": Cell(lstm_step, 4, 2), "gru": Cell(gru_step, 3, 1)}


class RecurrentLayer(nn.Module):
    """One layer in one direction. Its weights have the names and layout of torch's, so that they can be copied."""

    def __init__(self, in_features: int, width: int, cell: str, backward: bool = False) -> None:
        super().__init__()
        self.cell, self.width, self.backward = chosen(CELLS, cell, "cell"), width, backward
        rows = self.cell.gates * width
        self.weight_ih = nn.Parameter(torch.empty(rows, in_features))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def forward(
        self, x: Tensor, length: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """(B, T, I) -> (B, T, C) and the last state, each part (B, C)."""
        x = _reversed(x, length) if self.backward else x
        steps = F.linear(x, self.weight_ih, self.bias_ih).unbind(dim=1)  # T times (B, G C)
        if state is None:
            state = (x.new_zeros(len(x), self.width),) * self.cell.states
        live = None if length is None else _live(length, len(steps))  # (B, T)
        outputs = []
        for t, now in enumerate(steps):
            before = F.linear(state[0], self.weight_hh, self.bias_hh)  # (B, G C)
            after = self.cell.step(now, before, state)
            if live is not None:  # what has ended keeps its state
                here = live[:, t, None]
                after = tuple(
                    torch.where(here, new, old) for new, old in zip(after, state, strict=True)
                )
            state = after
            outputs.append(state[0])
        y = torch.stack(outputs, dim=1)  # (B, T, C)
        if live is not None:
            y = y * live[:, :, None]
        return (_reversed(y, length) if self.backward else y), state


class Recurrent(nn.Module):
    """Layers on one another, each in one or both directions, with dropout between them.

    Sequences of the given lengths (B,) are as if each was alone: what follows their end is seen by nothing, and is 0 in
    the outputs. Weights are drawn by `initialise_recurrent`, which the model that holds it calls.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int = 1,
        cell: str = "lstm",
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be 1 or more, got {depth}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.directions = 2 if bidirectional else 1
        self.out_features = self.directions * width
        self.layers = nn.ModuleList(
            RecurrentLayer(self.out_features if i else in_features, width, cell, backward)
            for i in range(depth)
            for backward in (False, True)[: self.directions]
        )
        self.dropout = nn.Dropout(dropout)
        initialise_recurrent(self)

    def forward(
        self, x: Tensor, length: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """(B, T, I) -> (B, T, D C) and the last states, each part (L D, B, C), the directions of a layer together.

        `state`: the first ones, else 0.
        """
        lasts: list[State] = []
        for first in range(0, len(self.layers), self.directions):
            outputs = []
            for i in range(first, first + self.directions):
                begin = None if state is None else tuple(part[i] for part in state)
                y, last = self.layers[i](x, length, begin)
                outputs.append(y)
                lasts.append(last)
            x = torch.cat(outputs, dim=2)  # (B, T, D C)
            if first + self.directions < len(self.layers):
                x = self.dropout(x)
        return x, tuple(torch.stack(part) for part in zip(*lasts, strict=True))


def initialise_recurrent(network: nn.Module) -> None:
    """Draw the weights of all recurrent layers of a network from the default generator."""
    for layer in network.modules():
        if isinstance(layer, RecurrentLayer):
            nn.init.normal_(
                layer.weight_ih, std=layer.weight_ih.shape[1] ** -0.5
            )  # keeps the variance
            for gate in layer.weight_hh.chunk(layer.cell.gates):
                nn.init.orthogonal_(
                    gate
                )  # keeps the length of a state over many steps (Saxe et al. 2014)
            nn.init.zeros_(layer.bias_ih)
            nn.init.zeros_(layer.bias_hh)
            if (
                layer.cell.step is lstm_step
            ):  # remember at first (Jozefowicz et al. 2015): sigmoid(1) = 0.73
                nn.init.ones_(layer.bias_ih.chunk(4)[1])


class RecurrentLanguageModel(nn.Module):
    """Many to many: at each token the logits of the next. `max_length`: how far back one looks who generates."""

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        depth: int = 1,
        cell: str = "lstm",
        embedding: int = 64,
        dropout: float = 0.0,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.recurrent = Recurrent(embedding, width, depth, cell, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, vocab_size)
        _initialise_ends(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> logits (B, T, V) of the next token."""
        x, _ = self.recurrent(self.dropout(self.embedding(tokens)))  # (B, T, C)
        return self.output(self.dropout(x))


class RecurrentClassifier(nn.Module):
    """Many to one: the class of a sequence of tokens, by the states that it ends with, read in one or both ways."""

    def __init__(
        self,
        num_classes: int,
        vocab_size: int,
        width: int = 128,
        depth: int = 1,
        cell: str = "lstm",
        embedding: int = 64,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.recurrent = Recurrent(embedding, width, depth, cell, bidirectional, dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(self.recurrent.out_features, num_classes)
        _initialise_ends(self)

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        """Tokens (B, T) int64, of which each row has `length` (B,) -> logits (B, K)."""
        x = self.dropout(self.embedding(tokens))  # (B, T, E)
        _, (hidden, *_) = self.recurrent(x, length)  # (L D, B, C)
        last = hidden[-self.recurrent.directions :]  # (D, B, C)
        return self.output(self.dropout(last.transpose(0, 1).flatten(1)))


def _initialise_ends(model: RecurrentLanguageModel | RecurrentClassifier) -> None:
    """The embedding's and the output's; the layers between have drawn theirs."""
    nn.init.normal_(model.embedding.weight)
    nn.init.normal_(
        model.output.weight, std=0.5 * model.output.in_features**-0.5
    )  # small first logits
    nn.init.zeros_(model.output.bias)


def _live(length: Tensor, steps: int) -> Tensor:
    """(B,) -> (B, T): whether a step is within its sequence."""
    return torch.arange(steps, device=length.device) < length[:, None]


def _reversed(x: Tensor, length: Tensor | None) -> Tensor:
    """(B, T, C): each sequence from its end; what follows the end stays where it is."""
    if length is None:
        return x.flip(1)
    places = torch.arange(x.shape[1], device=x.device)
    mirrored = length[:, None] - 1 - places  # (B, T)
    places = torch.where(mirrored < 0, places, mirrored)
    return x.gather(1, places[:, :, None].expand_as(x))
