"""Batch norm over all ranks: statistics of the whole global batch, with any gradient taken through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from dist_train.errors import UserError
from dist_train.world import World


def check_groups(world: World, global_batch: int, micro_batch: int) -> None:
    """Synchronised groups are whole global batches on any number of ranks, or refused: one micro-batch a rank."""
    if global_batch != micro_batch * world.size:
        raise UserError(
            f"batch_norm: synchronised is over the global batch of {global_batch}, so each of {world.size} ranks takes"
            f" one micro-batch: expected data.micro_batch {global_batch / world.size:g} instead of {micro_batch}"
        )


@contextmanager
def statistics_of_the_batch(network: nn.Module) -> Iterator[None]:
    """In here a forward in training leaves a norm's running statistics as those of its own batch, without a past."""
    kept = [(m, m.momentum) for m in network.modules() if isinstance(m, _NormBase)]
    for module, _ in kept:
        module.momentum = 1.0
    try:
        yield
    finally:
        for module, momentum in kept:
            module.momentum = momentum


def synchronise(network: nn.Module, world: World) -> None:
    """Make every batch norm of `network` one over all ranks. Names and values stay."""
    if world.size == 1:
        return
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            kind = type(module)
            module.__class__ = type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {})


class _Synchronised(_BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...). In training by mean and variance over all ranks' B and positions."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1] * dist.get_world_size()
        kind, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = _SumOverRanks.apply(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply((centred * centred).sum(axes)) / count
        if self.track_running_stats:
            self._note(mean.detach(), variance.detach() * count / max(count - 1, 1))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(kind)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = (
            self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        )
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class _SumOverRanks(torch.autograd.Function):
    """y = sum over ranks of x. As all ranks' losses add up, its gradient is the same sum again, of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)
