"""Metrics: a sum and a count over the samples of a split, added over micro-batches and ranks.

A metric is a callable `(outputs, micro)`, or a class of such. `outputs` are the tensors that the
objective returns for a micro-batch. It returns either one value a row, shape (b,), whose mean over
the rows that count is the figure, or a pair (sum, count) of its own. Where it has a method
`finish(mean) -> float`, that turns the mean into the figure.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_train.errors import UserError


class Rows(Protocol):
    """What a metric sees of a micro-batch: its fields, and how many of its rows are not padding."""

    real: int

    def __getitem__(self, field: str) -> Tensor: ...


class Metric:
    """Accumulates one metric over the micro-batches of a rank, in float64, without a host sync.

    Before each evaluation `reset()`, for each micro-batch `update(outputs, micro)`; then the ranks
    add up their `sums()`, and `finish(*total.tolist())` is the figure.
    """

    def __init__(self, name: str, measure: Callable[[Mapping[str, Tensor], Rows], Any]) -> None:
        self.name = name
        self._measure = measure
        self._finish: Callable[[float], float] = getattr(measure, "finish", float)
        self.reset()

    @classmethod
    def wrap(cls, part: Any, name: str) -> Metric:
        """Make a metric of a function, an object or a class that is built without arguments.

        Raises UserError for what cannot be called.
        """
        measure = part() if inspect.isclass(part) else part
        if not callable(measure):
            raise UserError(f"metric {name}: expected a callable (outputs, micro), got {part!r}")
        return cls(name, measure)

    def reset(self) -> None:
        """Forget what was added."""
        self._sums = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, outputs: Mapping[str, Tensor], micro: Rows) -> None:
        """Add one micro-batch. Raises UserError if the metric returns neither rows nor a pair."""
        result = self._measure(outputs, micro)
        if isinstance(result, tuple):
            total, count = (torch.as_tensor(part, dtype=torch.float64) for part in result)
        elif isinstance(result, Tensor) and result.ndim == 1 and len(result) >= micro.real:
            total = result[: micro.real].sum(dtype=torch.float64)
            count = total.new_tensor(micro.real)
        else:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise UserError(
                f"metric {self.name}: returned {shape},"
                " expected one value a row or a pair (sum, count)"
            )
        self._sums = self._sums.to(total.device) + torch.stack([total, count.to(total.device)])

    def sums(self) -> Tensor:
        """The (sum, count) so far: float64 (2,)."""
        return self._sums

    def finish(self, total: float, count: float) -> float:
        """The figure of a split from the sums over all ranks."""
        if count <= 0:
            raise UserError(f"metric {self.name}: nothing was counted, the split has no samples")
        return self._finish(total / count)


def accuracy(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """The share of rows whose largest of `logits` (b, K) is at their `label` (b,)."""
    return (outputs["logits"].argmax(dim=-1) == micro["label"]).double()


@dataclass(frozen=True)
class LossFigure:
    """A figure from the mean loss, `loss_sum` / `loss_count`: nats a sample or a token."""

    finish: Callable[[float], float]

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> tuple[Tensor, Tensor]:
        return outputs["loss_sum"], outputs["loss_count"]


def exponential(nats: float) -> float:
    """exp, or infinity where it overflows."""
    return math.exp(nats) if nats < 709.0 else math.inf


loss = LossFigure(float)
bits_per_byte = LossFigure(lambda nats: nats / math.log(2.0))
perplexity = LossFigure(exponential)
