"""Temporal convolutional network: dilated causal convolutions, no recurrence (Bai et al. 2018, arXiv:1803.01271).

Shapes: B sequences, T steps, V vocabulary, E embedding, C channels (`width`), k kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalConvolution(nn.Module):
    """y(t) = b + sum over j < k of W(j) x(t - j dilation), what is before the start being 0.

    Weight norm (Salimans and Kingma 2016, arXiv:1602.07868): W = gain V / |V|, for each output channel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.direction = nn.Parameter(torch.empty(out_channels, in_channels, kernel))
        self.gain = nn.Parameter(torch.empty(out_channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T)."""
        weight = self.gain * self.direction / self.direction.norm(dim=(1, 2), keepdim=True)
        before = (weight.shape[2] - 1) * self.dilation
        return F.conv1d(F.pad(x, (before, 0)), weight, self.bias, dilation=self.dilation)


class Block(nn.Module):
    """Two convolutions of one dilation, added to the residual stream; dropout of single numbers, in the paper of whole
    channels."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = CausalConvolution(in_channels, channels, kernel, dilation)
        self.conv2 = CausalConvolution(channels, channels, kernel, dilation)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Conv1d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T)."""
        y = self.dropout(F.relu(self.conv1(x)))
        y = self.dropout(F.relu(self.conv2(y)))
        return F.relu(self.shortcut(x) + y)


class TemporalConvolution(nn.Module):
    """A language model: `depth` blocks, whose dilations double, see `context` tokens, the present one among them.

    `max_length`: how far back one looks who generates.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        depth: int = 6,
        kernel: int = 3,
        embedding: int = 64,
        dropout: float = 0.0,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("kernel", kernel)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.max_length = max_length
        self.context = 1 + 2 * (kernel - 1) * (2**depth - 1)
        self.embedding = nn.Embedding(vocab_size, embedding)
        self.blocks = nn.ModuleList(
            Block(width if i else embedding, width, kernel, 2**i, dropout) for i in range(depth)
        )
        self.output = nn.Linear(width, vocab_size)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights from the default generator.

        A row of length sqrt(2) passes the variance on through its ReLU (He et al. 2015). The branches of `depth` blocks
        add up in the stream: each has 1 / depth of the variance, its two convolutions alike.
        """
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(
            self.output.weight, std=0.5 * self.output.in_features**-0.5
        )  # small first logits
        nn.init.zeros_(self.output.bias)
        for module in self.modules():
            if isinstance(module, CausalConvolution):
                nn.init.normal_(module.direction)
                nn.init.constant_(module.gain, 2.0**0.5 / len(self.blocks) ** 0.25)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block) and isinstance(module.shortcut, nn.Conv1d):
                channels = module.shortcut.in_channels
                nn.init.normal_(module.shortcut.weight, std=channels**-0.5)  # keeps the variance

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 -> logits (B, T, V) of the next token."""
        x = self.embedding(tokens).transpose(1, 2)  # (B, E, T)
        for block in self.blocks:
            x = block(x)  # (B, C, T)
        return self.output(x.transpose(1, 2))  # (B, T, V)
