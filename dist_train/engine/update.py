"""The last step of a turn: gradients divided by their scale and by how far they are beyond the norm, clipped, used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_train.engine.kernels import kernels_of
from dist_train.networks.precision import LossScale


class Update:
    """What an engine does with the gradients of a turn, by an optimiser whose state exists.

    An optimiser without fused kernels, one with hooks, and any under a profiler, makes its own `step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = optimizer
        self._kernels = kernels_of(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._count = len(parameters)
        # whether the optimiser's kernel can divide the gradients while it reads them
        self._divides = bool(optimizer.defaults.get("fused")) and all(
            p.dtype == torch.float32 for p in parameters
        )
        self._numbers: dict[float, list[Tensor]] = {}

    def turn(
        self,
        gradients: list[Tensor],
        norm: Tensor,
        loss_scale: LossScale | None,
        clip_norm: float | None,
        clip_value: float | None,
    ) -> Tensor | None:
        """Update by `gradients`, whose norm is `norm` (0-d), clipped by norm and by value.

        Returns: the norm without the loss scale; None where it has overflowed, and nothing is changed.
        """
        scale = None
        if loss_scale is not None:
            scale = loss_scale.value
            norm = norm / scale
            if not torch.isfinite(norm):
                return None
        self(gradients, self.divisor_of(norm, scale, clip_norm), clip_value)
        return norm

    def __call__(
        self, gradients: list[Tensor], divisor: Tensor | None, clip_value: float | None
    ) -> None:
        """Update by `gradients` (those that the parameters have) / `divisor`, each entry clipped into
        [-clip_value, clip_value]."""
        if not gradients:
            return  # of a player with fewer rows than ranks a rank may hold nothing
        in_the_kernel = self._divides and clip_value is None
        if divisor is not None and not in_the_kernel:
            devices = {gradient.device for gradient in gradients}
            for device in devices:
                there = [gradient for gradient in gradients if gradient.device == device]
                torch._foreach_div_(there, divisor.to(device))
        if clip_value is not None:
            torch._foreach_clamp_min_(gradients, -clip_value)
            torch._foreach_clamp_max_(gradients, clip_value)
        self._step(len(gradients), divisor if in_the_kernel else None)

    def _step(self, gradients: int, divisor: Tensor | None) -> None:
        optimizer = self._optimizer
        hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        watched = hooked or torch.autograd._profiler_enabled()
        if self._kernels and gradients == self._count and not watched:
            for kernel in self._kernels:
                kernel(divisor)
            return
        optimizer.grad_scale = divisor
        optimizer.step()
        optimizer.grad_scale = None

    def divisor_of(
        self, norm: Tensor, scale: float | None, clip_norm: float | None
    ) -> Tensor | None:
        """The loss scale times how often `norm` exceeds `clip_norm`: by what gradients are to be divided; None by 1.

        Args:
            norm: of the gradients without the scale (0-d).
        """
        divisor = None if scale is None else torch.full_like(norm, scale)
        if clip_norm is not None:
            excess = self._excess(norm, clip_norm)
            divisor = excess if divisor is None else divisor * excess
        return divisor

    def _excess(self, norm: Tensor, bound: float) -> Tensor:
        """max(1, (norm + 1e-6) / bound), of tensors that are there: a number would become one at each step."""
        if bound not in self._numbers:
            numbers = (1.0, 1e-6 / bound, bound)
            self._numbers = {bound: [torch.full_like(norm, number) for number in numbers]}
        one, least, divisor = self._numbers[bound]
        return torch.maximum(torch.addcdiv(least, norm, divisor), one)
