"""PixelRNN with Row LSTM (van den Oord et al. 2016, "Pixel recurrent neural networks", arXiv:1601.06759, section 3.1).

An LSTM goes from row to row, for all columns at once: what it is given of its row is masked, what it remembers is a
convolution over the row above. So a sub-pixel sees a triangle above it, and its row to the left.
Shapes: B samples, V levels, C channels, images H x W, w maps, K numbers of a condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_train.models.recurrent import State as Memory
from dist_train.models.recurrent import lstm_step
from dist_train.models.subpixels import (
    MaskedConvolution,
    State,
    bias_of,
    by_level,
    check_arguments,
    head,
    initialise,
    numbers_of_condition,
    place_of,
    vector_of,
)


class RowLSTMLayer(nn.Module):
    """x + what an LSTM makes of it, which goes down the rows."""

    def __init__(self, width: int, kernel: int, channels: int, numbers: int) -> None:
        super().__init__()
        self.input_to_state = MaskedConvolution(
            width, 4 * width, (1, kernel), channels, own=True, parts=4
        )
        self.state_to_state = nn.Conv1d(width, 4 * width, kernel, padding=kernel // 2, bias=False)
        self.output = MaskedConvolution(width, width, (1, 1), channels, own=True)
        self.condition = nn.Linear(numbers, 4 * width, bias=False) if numbers else None

    def forward(self, x: Tensor, memory: Memory, vector: Tensor | None) -> tuple[Tensor, Memory]:
        """Rows (B, w, H, W), and hidden state and cell of the row above them (B, w, W) -> (B, w, H, W), and those of
        the last row."""
        inputs = self.input_to_state(x)  # (B, 4w, H, W)
        bias = bias_of(self.condition, vector)
        inputs = inputs if bias is None else inputs + bias
        hidden = []
        for row in inputs.unbind(dim=2):  # (B, 4w, W)
            memory = lstm_step(row, self.state_to_state(memory[0]), memory)
            hidden.append(memory[0])
        return x + self.output(torch.stack(hidden, dim=2)), memory


class RowLSTM(nn.Module):
    """A 7 x 7 convolution with mask A, `depth` layers of Row LSTM, then two masked 1 x 1 convolutions to the logits.

    Args: as those of `PixelCNN`; `kernel` is that of both convolutions along a row.
    """

    FIRST = 7

    def __init__(
        self,
        channels: int = 1,
        levels: int = 256,
        width: int = 24,
        depth: int = 2,
        kernel: int = 3,
        num_classes: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(channels, width, kernel, depth)
        self.levels, self.width = levels, width
        self.num_classes, self.context_dim = num_classes, context_dim
        numbers = numbers_of_condition(num_classes, context_dim)
        self.first = MaskedConvolution(channels, width, (self.FIRST,) * 2, channels, own=False)
        self.layers = nn.ModuleList(
            RowLSTMLayer(width, kernel, channels, numbers) for _ in range(depth)
        )
        self.head = head(width, channels, levels)
        initialise(self)
        for layer in self.layers:
            assert isinstance(layer, RowLSTMLayer)
            nn.init.normal_(layer.state_to_state.weight, std=(kernel * width) ** -0.5)
            # remember at first (Jozefowicz et al. 2015): sigmoid(1) = 0.73
            assert layer.input_to_state.bias is not None
            nn.init.ones_(layer.input_to_state.bias.chunk(4)[1])

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        known: int | None = None,
        state: State | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """As `PixelCNN.forward`."""
        vector = vector_of(condition, self.num_classes, self.context_dim, x)
        x = 2 * x - 1  # so that black is not what lies outside
        nothing = x.new_zeros(len(x), self.width, x.shape[3])
        start: list[Memory] = [(nothing, nothing)] * len(self.layers)
        if known is None or state is None:
            y, _ = self._through(self.first(x), start, vector)
            return by_level(self.head(y), self.levels)
        row, column, channel = place_of(known, x.shape)
        done = state.get("row", 0)  # the rows that the memories have seen
        memories = state.get("memories", start)
        if done < row:
            _, memories = self._through(self.first(x[:, :, :row])[:, :, done:], memories, vector)
        near = x[:, :, max(0, row - self.FIRST // 2) : row + 1]
        y, _ = self._through(self.first(near)[:, :, -1:], memories, vector)  # (B, w, 1, W)
        logits = by_level(self.head(y[:, :, :, column : column + 1]), self.levels)
        return logits[:, :, channel, 0, 0], {"row": row, "memories": memories}

    def _through(
        self, x: Tensor, memories: list[Memory], vector: Tensor | None
    ) -> tuple[Tensor, list[Memory]]:
        """Rows (B, w, H, W) through all layers, and the memories after them."""
        after = []
        for layer, memory in zip(self.layers, memories, strict=True):
            x, memory = layer(x, memory, vector)
            after.append(memory)
        return x, after
