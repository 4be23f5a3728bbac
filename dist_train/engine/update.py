"""The last step of a turn: gradients divided by their scale and by how far they are beyond the norm, clipped, used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def divides_by_scale(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether the optimiser's kernel can divide the gradients while it reads them."""
    return bool(optimizer.defaults.get("fused")) and all(
        p.dtype == torch.float32 for p in parameters
    )


def divisor_of(norm: Tensor, scale: float | None, clip_norm: float | None) -> Tensor | None:
    """By what gradients are to be divided: the loss scale times how often `norm` exceeds `clip_norm`; None by nothing.

    Args:
        norm: of the gradients without the scale (0-d).
    """
    divisor = None if scale is None else torch.full_like(norm, scale)
    if clip_norm is not None:
        excess = (norm + 1e-6).div_(clip_norm).clamp_(min=1.0)
        divisor = excess if divisor is None else divisor * excess
    return divisor


def step(
    optimizer: Any,
    gradients: list[Tensor],
    divisor: Tensor | None,
    clip_value: float | None,
    *,
    fused: bool,
) -> None:
    """Step by gradients / `divisor`, each entry clipped into [-clip_value, clip_value].

    Args:
        fused: `divides_by_scale` of the optimiser.
    """
    in_the_kernel = fused and clip_value is None
    if divisor is not None and not in_the_kernel:
        devices = {gradient.device for gradient in gradients}
        for device in devices:
            there = [gradient for gradient in gradients if gradient.device == device]
            torch._foreach_div_(there, divisor.to(device))
    if clip_value is not None:
        torch._foreach_clamp_min_(gradients, -clip_value)
        torch._foreach_clamp_max_(gradients, clip_value)
    if in_the_kernel:  # it divides while it reads the gradients
        optimizer.grad_scale = divisor
    optimizer.step()
    if in_the_kernel:
        optimizer.grad_scale = None
