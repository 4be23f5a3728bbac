"""Metrics: sums over the samples of a split, added over micro-batches and ranks, and the figure they make.

A metric is a callable `(outputs, micro)`, or a class of such. `outputs` are the tensors that the
objective returns for a micro-batch. It returns one of three:

- one value a row, shape (b,): the figure is their mean over the rows that count;
- a pair (sum, count) of its own: the figure is sum / count;
- `Sums(values)`, any number of sums (k,): the figure is what `finish(sums)` makes of their totals. So
  what is no mean (R2, calibration) is the same on any number of ranks too.

Where a metric of the first two kinds has a method `finish(mean) -> float`, that turns the mean into the figure.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train import bleu
from dist_train.errors import UserError
from dist_train.world import World


class Rows(Protocol):
    """What a metric sees of a micro-batch: its fields, and how many of its rows are not padding."""

    real: int

    def __getitem__(self, field: str) -> Tensor: ...


@dataclass(frozen=True)
class Sums:
    """What a metric adds up over a split when a sum and a count are not enough: (k,)."""

    values: Tensor


class Metric:
    """Accumulates one metric over the micro-batches of a rank, in float64, without a host sync.

    Before each evaluation `reset()`, for each micro-batch `update(outputs, micro)`; then the ranks
    add up their `sums()`, and `finish(*total.tolist())` is the figure.
    """

    def __init__(self, name: str, measure: Callable[[Mapping[str, Tensor], Rows], Any]) -> None:
        self.name = name
        self._measure = measure
        self._finish: Callable[[Any], float] = getattr(measure, "finish", float)
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
        self._is_mean = True

    @torch.no_grad()
    def update(self, outputs: Mapping[str, Tensor], micro: Rows) -> None:
        """Add one micro-batch. Raises UserError if the metric returns none of the three kinds, or needs what the
        objective does not give."""
        try:
            result = self._measure(outputs, micro)
        except KeyError as error:
            if error.args[0] in outputs:
                raise
            raise UserError(
                f"metric {self.name}: needs '{error.args[0]}' of the evaluation, which this objective does not give"
                f" (it gives {', '.join(outputs)})"
            ) from error
        self._is_mean = not isinstance(result, Sums)
        if isinstance(result, Sums):
            sums = result.values.double()
        elif isinstance(result, tuple):
            total, count = (torch.as_tensor(part, dtype=torch.float64) for part in result)
            sums = torch.stack([total, count.to(total.device)])
        elif isinstance(result, Tensor) and result.ndim == 1 and len(result) >= micro.real:
            total = result[: micro.real].sum(dtype=torch.float64)
            sums = torch.stack([total, total.new_tensor(micro.real)])
        else:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise UserError(
                f"metric {self.name}: returned {shape},"
                " expected one value a row, a pair (sum, count) or Sums(values)"
            )
        before = self._sums.to(sums.device)
        self._sums = before + sums if before.shape == sums.shape else sums

    def sums(self) -> Tensor:
        """The sums so far, (sum, count) where the figure is a mean: float64 (k,)."""
        return self._sums

    def finish(self, *totals: float) -> float:
        """The figure of a split from the sums over all ranks."""
        if not self._is_mean:
            return self._finish(list(totals))
        total, count = totals
        if count <= 0:
            raise UserError(f"metric {self.name}: nothing was counted, the split has no samples")
        return self._finish(total / count)


def figures(metrics: Mapping[str, Metric], world: World) -> dict[str, float]:
    """The figure of each metric from what all ranks have added up (collective): one sum over the ranks for all."""
    sums = [metric.sums().to(world.device) for metric in metrics.values()]
    totals = iter(world.sum_(torch.cat(sums)).tolist())
    return {
        name: metric.finish(*itertools.islice(totals, len(own)))
        for (name, metric), own in zip(metrics.items(), sums, strict=True)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Of classes: `logits` (b, K) against `label` (b,)


def accuracy(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """The share of rows whose largest of `logits` (b, K) is at their `label` (b,)."""
    return (outputs["logits"].argmax(dim=-1) == micro["label"]).double()


def error(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """The 0-1 loss: the share of rows that `accuracy` does not count."""
    return 1.0 - accuracy(outputs, micro)


@dataclass(frozen=True)
class TopK:
    """The share of rows whose label is among the `k` largest logits."""

    k: int

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
        logits = outputs["logits"]
        best = logits.topk(min(self.k, logits.shape[-1])).indices  # (b, k)
        return (best == micro["label"][:, None]).any(dim=1).double()


top_2, top_5 = TopK(2), TopK(5)


def brier(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """Brier's score (1950): the squared distance of the probabilities from the label's, summed over the classes."""
    probability = outputs["logits"].double().softmax(dim=-1)
    return (probability - F.one_hot(micro["label"], probability.shape[-1])).square().sum(dim=-1)


@dataclass(frozen=True)
class CalibrationError:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): in bins of equal width of the confidence, the
    mean distance between confidence and accuracy, weighted by how many rows fall into each."""

    bins: int = 15

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Sums:
        confidence, chosen = outputs["logits"][: micro.real].double().softmax(dim=-1).max(dim=-1)
        right = (chosen == micro["label"][: micro.real]).double()
        place = (confidence * self.bins).ceil().long().clamp(1, self.bins) - 1  # (b,)
        member = (place[:, None] == torch.arange(self.bins, device=place.device)).double()
        count = confidence.new_tensor([micro.real])
        return Sums(torch.cat([count, (confidence - right) @ member]))  # (1 + bins,)

    def finish(self, sums: list[float]) -> float:
        count, *gaps = sums
        return sum(map(abs, gaps)) / count


# ---------------------------------------------------------------------------------------------------------------------
# Of numbers: `prediction` (b, D) against `target` (b, D), in the target's own units


class R2:
    """The share of the target's variance that the prediction explains: 1 - squared errors / squared deviations."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Sums:
        target = outputs["target"][: micro.real].double()  # (b, D)
        errors = (target - outputs["prediction"][: micro.real]).square().sum()
        count = target.new_tensor(float(micro.real))
        return Sums(
            torch.cat([torch.stack([count, errors]), target.sum(0), target.square().sum(0)])
        )

    def finish(self, sums: list[float]) -> float:
        count, errors, *rest = sums
        totals, squares = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        deviations = sum(
            square - total**2 / count for total, square in zip(totals, squares, strict=True)
        )
        return 1.0 - errors / deviations if deviations > 0 else math.nan


class RootMeanSquaredError:
    """The root of the mean squared error of an element."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> tuple[Tensor, float]:
        errors = _errors(outputs, micro)
        return errors.square().sum(), float(errors.numel())

    def finish(self, mean: float) -> float:
        return math.sqrt(mean)


class ConstantVarianceNLL:
    """The least negative log-likelihood that Gaussians about these predictions reach with ONE variance for all rows:
    the one that fits this very split best. What a predicted variance has to beat; nats a row, D = 1."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> tuple[Tensor, float]:
        errors = _errors(outputs, micro)
        return errors.square().sum(), float(errors.numel())

    def finish(self, mean: float) -> float:
        return 0.5 * math.log(2 * math.pi * math.e * mean) if mean > 0 else -math.inf


def _errors(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    return (outputs["target"] - outputs["prediction"])[: micro.real].double()


# ---------------------------------------------------------------------------------------------------------------------
# Of what was written: `written` (b, F), `written_length` (b,) against `truth` (b, T), `truth_length` (b,)


def edit_error(outputs: Mapping[str, Tensor], micro: Rows) -> tuple[float, float]:
    """The edits (insert, delete, replace: Levenshtein 1966) that make the true rows of what was written, free running,
    for each true token."""
    written, truth = outputs["written"].tolist(), outputs["truth"].tolist()
    lengths = zip(outputs["written_length"].tolist(), outputs["truth_length"].tolist(), strict=True)
    edits, count = 0, 0
    for row, (had, has) in enumerate(itertools.islice(lengths, micro.real)):
        edits += edit_distance(written[row][:had], truth[row][:has])
        count += has
    return float(edits), float(count)


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The least number of insertions, deletions and replacements that turn one sequence into the other."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        now = [i]
        for j, b in enumerate(other, start=1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return before[-1]


class BLEU:
    """Corpus BLEU (Papineni et al. 2002; sacrebleu's, mixed case, 13a, exponential smoothing), 0 to 100, from `bleu`
    (b, 10): each row's counts (`dist_train.bleu`)."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Sums:
        if "bleu" not in outputs:
            raise UserError("metric bleu: nothing was decoded; give the objective decode: TOKENS")
        return Sums(outputs["bleu"][: micro.real].sum(0))

    def finish(self, sums: list[float]) -> float:
        return bleu.score(sums)


# ---------------------------------------------------------------------------------------------------------------------
# Of the loss


def nll(outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
    """The negative log-likelihood `nll` (b,) of each row's label or target: nats a row, whatever was trained."""
    return outputs["nll"]


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


# ---------------------------------------------------------------------------------------------------------------------
# Of a density: what the objective says of each row, (b,)


@dataclass(frozen=True)
class OfEachRow:
    """The mean of what the objective gives as `name`."""

    name: str

    def __call__(self, outputs: Mapping[str, Tensor], micro: Rows) -> Tensor:
        return outputs[self.name]


elbo, importance_bound, kl = map(OfEachRow, ("elbo", "importance_bound", "kl"))
"""Nats a sample: a bound on log p(x), a tighter one (Burda et al. 2016, arXiv:1509.00519), and the code's share."""
bits_per_dim = OfEachRow("bits_per_dim")
"""Bits an element of x would take in a code; of what has levels."""
