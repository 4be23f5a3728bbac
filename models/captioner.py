"""One to many: a convolutional encoder sets the first state of what writes (Vinyals et al. 2015, arXiv:1411.4555).

Shapes: B pictures of H x W, T tokens, V vocabulary, E embedding, C width of the state, L layers.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train.models.layers import convolution, norm_of
from dist_train.models.recurrent import CELLS, Recurrent


class Encoder(nn.Module):
    """Four convolutions, each followed by a pooling that halves the side, and the mean over what is left."""

    def __init__(self, in_channels: int, width: int, norm: str) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width, 4 * width]
        self.convolutions = nn.ModuleList(
            convolution(a, b, 3, bias=norm == "none") for a, b in itertools.pairwise(channels)
        )
        self.norms = nn.ModuleList(norm_of(norm, c) for c in channels[1:])
        self.out_features = channels[-1]

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4 width)."""
        x = image
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(convolve(x))), 2)  # (B, channels, H / 2, W / 2) and so on
        return x.mean(dim=(2, 3))


class Captioner(nn.Module):
    """A picture to the logits of each word that describes it, given those before it.

    `max_length`: of the longest caption that one may ask for. The side of a picture is 16 pixels or more.
    """

    def __init__(
        self,
        vocab_size: int,
        in_channels: int = 3,
        width: int = 256,
        depth: int = 1,
        cell: str = "lstm",
        embedding: int = 64,
        encoder_width: int = 32,
        norm: str = "layer",
        dropout: float = 0.0,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.encoder = Encoder(in_channels, encoder_width, norm)
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.recurrent = Recurrent(embedding, width, depth, cell, dropout=dropout)
        self.shape = (CELLS[cell].states, depth, width)
        self.first = nn.Linear(self.encoder.out_features, CELLS[cell].states * depth * width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, vocab_size)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator; the recurrent layers have drawn theirs."""
        nn.init.normal_(self.embedding.weight)
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # He et al. 2015
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.first.weight, std=self.first.in_features**-0.5)
        nn.init.normal_(
            self.output.weight, std=0.5 * self.output.in_features**-0.5
        )  # small first logits
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Tokens (B, T) int64 and what they describe (B, in_channels, H, W) -> logits (B, T, V) of the next token."""
        first = torch.tanh(
            self.first(self.dropout(self.encoder(image)))
        )  # (B, parts L C): as bounded as a state
        parts, depth, width = self.shape
        state = first.view(-1, parts, depth, width).permute(1, 2, 0, 3)  # (parts, L, B, C)
        x, _ = self.recurrent(self.dropout(self.embedding(tokens)), state=tuple(state))  # (B, T, C)
        return self.output(self.dropout(x))
