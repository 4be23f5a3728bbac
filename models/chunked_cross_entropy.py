"""Cross-entropy of a linear head without its logits: they exist for some positions at a time.

With V = 50,304 words the logits of 16 sequences of 1,024 tokens are 3.3 GB in fp32, and their gradient as much again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Hidden (N, C), head (V, C), targets (N,) int64 -> losses (N,) fp32, `chunk` positions at a time.

    Equal to `F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")`, gradients too; backward
    computes the logits again, one product more. A chunk that holds all N positions keeps them instead: no memory is
    saved, but a compiled model has the loss in its graph, which is faster. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(kind), weight.to(kind)
    with torch.autocast(device, enabled=False):
        if chunk >= len(hidden):
            return _losses(hidden, weight, targets)
        return _Chunked.apply(hidden, weight, targets, chunk)


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        losses = [
            _losses(part, weight, truth)
            for part, truth in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """d loss / d logits = softmax(logits) - onehot(target), per position."""
        hidden, weight, targets = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            to_logits = F.linear(hidden[rows], weight).float().softmax(dim=-1)  # (n, V)
            to_logits.scatter_add_(1, targets[rows, None], -torch.ones_like(to_logits[:, :1]))
            to_logits = to_logits.mul_(gradient[rows, None]).to(hidden.dtype)
            to_hidden[rows] = to_logits @ weight
            to_weight += to_logits.T @ hidden[rows]
        return to_hidden, to_weight.to(weight.dtype), None, None
