"""Bugs that people have had, planted in N ranks and never in one process: `verify` must find each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.callbacks import Callback
from dist_train.engine.fsdp import FsdpEngine
from dist_train.engine.mesh import ReduceScatter
from dist_train.objectives.classification import Classification


class WrongLossScale(Callback):
    """The loss is averaged over the ranks, and so are the gradients."""

    def run_begins(self, run: Any) -> None:
        for engine in run.engines.values():
            engine.backward = _scaled(engine.backward, 1 / run.world.size)


def _scaled(backward: Any, factor: float) -> Any:
    return lambda loss, share, *, last: backward(loss, share * factor, last=last)


class ForgottenReduction(Callback):
    """Each rank keeps its own gradients."""

    def run_begins(self, run: Any) -> None:
        if run.world.size == 1:
            return
        for engine in run.engines.values():
            if isinstance(engine, FsdpEngine):
                for number, unit in enumerate(engine._units):
                    unit.set_custom_reduce_scatter(OwnRows(engine._order, number))
            else:
                buckets = engine._buckets
                buckets._launch = lambda buckets=buckets: buckets.work.append(Done())


class Done:
    def wait(self) -> None: ...


class OwnRows(ReduceScatter):
    """Gives each rank its part of its own gradients."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, *_: Any, **__: Any
    ) -> Any:
        self.order.note(self.name)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
        return Done()


class UnseededDropout(nn.Module):
    """(B, 1, 8, 8) -> (B, 10), with dropout from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.draws = np.random.default_rng(0)

    def forward(self, image: Tensor) -> Tensor:
        kept = torch.from_numpy(self.draws.random(image.shape) > 0.1)
        return self.linear((image * kept).flatten(1))


class Loud(Classification):
    """No bug: a loss so large that fp16 gradients overflow until the loss scale has come down."""

    def loss(self, *arguments: Any) -> Any:
        loss, logged = super().loss(*arguments)
        return 200.0 * loss, logged


class NoBug(Callback):
    """For what is planted in the model itself."""


class RepeatingSampler(Callback):
    """Every second step takes the samples of the step before."""

    def run_begins(self, run: Any) -> None:
        if run.world.size > 1:
            run.data = _Repeating(run.data)


class _Repeating:
    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def from_(self, step: int, stop: int) -> Iterator[Any]:
        for now in range(step, stop):
            even = now - now % 2
            for _, batch in self.batches.from_(even, even + 1):
                yield now, batch


class LocalClip(Callback):
    """Each rank clips by the norm of the slice that it owns, about 1 / sqrt(ranks) of the global one."""

    def run_begins(self, run: Any) -> None:
        for engine in run.engines.values():
            engine.clip = _lenient(engine.clip, math.sqrt(run.world.size))


def _lenient(clip: Any, times: float) -> Any:
    return lambda norm=None, value=None: clip(None if norm is None else norm * times, value)


class LocalMean(Callback):
    """Each rank takes the mean over its own tokens, and the ranks the mean of these."""

    def run_begins(self, run: Any) -> None:
        size = run.world.size
        if size > 1:
            run.batch_weight = lambda batch: sum(run.objective.weight(m) for m in batch) * size


class TwiceUpdatedBuffer(Callback):
    """Running statistics take their update twice, as when recomputation runs the forward again."""

    def run_begins(self, run: Any) -> None:
        for engine in run.engines.values():
            if run.world.size > 1:
                engine._keeper.end = _twice(engine._keeper, engine._keeper.end)


def _twice(keeper: Any, end: Any) -> Any:
    def run() -> None:
        end()
        for buffer, before in zip(keeper.floats, keeper.before, strict=False):
            buffer.add_(buffer - before)

    return run
