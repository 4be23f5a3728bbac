"""Cross-entropy of a linear head without its logits: they exist for some positions at a time.

With V = 50,304 words the logits of 16 sequences of 1,024 tokens are 3.3 GB in fp32, and their gradient as much again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def chunked_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, chunk: int
) -> Tensor:
    """Hidden (N, C), head (V, C), targets (N,) int64, weights (N,) -> the weighted sum of the N losses, fp32.

    Equal to `(F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none") * weights).sum()`, gradients
    too, from the logits of `chunk` positions at a time. Since it is one sum, its gradient is known but for a factor as
    soon as the logits are there: forward computes both, and nothing is computed twice. Raises ValueError for a chunk
    below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {chunk}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(kind), head.to(kind)
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    with torch.autocast(device, enabled=False):
        return _Chunked.apply(hidden, head, targets, weights.float(), chunk, differentiated)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        differentiated: bool,
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        to_hidden, to_head = [], torch.zeros(head.shape, device=head.device)
        parts = (tensor.split(chunk) for tensor in (hidden, targets[:, None], weights[:, None]))
        for part, target, weight in zip(*parts, strict=True):
            logits = F.linear(part, head).float()  # (n, V)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss = loss + ((normaliser - logits.gather(1, target)) * weight).sum()
            if differentiated:  # d loss / d logits = weight (softmax(logits) - onehot(target))
                to_logits = (logits - normaliser).exp()
                to_logits = to_logits.scatter_add(1, target, -torch.ones_like(normaliser))
                to_logits = (to_logits * weight).to(part.dtype)
                to_hidden.append(to_logits @ head)
                to_head = to_head + to_logits.T @ part
        if differentiated:
            ctx.save_for_backward(torch.cat(to_hidden), to_head.to(head.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_hidden, to_head = ctx.saved_tensors
        return to_hidden * upstream, to_head * upstream, None, None, None, None
