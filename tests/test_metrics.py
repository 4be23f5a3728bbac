"""Metrics: sums and counts that do not depend on how a split is cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dist_train.components import CATALOGUE, resolve
from dist_train.errors import UserError
from dist_train.metrics import (
    Metric,
    RootMeanSquaredError,
    accuracy,
    bits_per_byte,
    loss,
    perplexity,
)


class Micro:
    """A micro-batch as metrics see it: `real` rows that count, the rest padding."""

    def __init__(self, real: int, **fields: Tensor) -> None:
        self.real = real
        self.fields = fields

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]


def measure(metric: Metric, batches: list[tuple[Mapping[str, Tensor], Micro]]) -> float:
    metric.reset()
    for outputs, micro in batches:
        metric.update(outputs, micro)
    return metric.finish(*metric.sums().tolist())


def test_accuracy_counts_real_rows_only() -> None:
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    label = torch.tensor([1, 1, 1, 0])
    metric = Metric.wrap(accuracy, "accuracy")
    assert measure(metric, [({"logits": logits}, Micro(3, label=label))]) == 2 / 3
    # The same rows in two micro-batches, one of padding alone besides.
    batches = [
        ({"logits": logits[:2]}, Micro(2, label=label[:2])),
        ({"logits": logits[2:]}, Micro(1, label=label[2:])),
        ({"logits": logits[2:]}, Micro(0, label=label[2:])),
    ]
    assert measure(metric, batches) == 2 / 3


def test_figures_of_the_loss_weigh_tokens_not_micro_batches() -> None:
    def outputs(nats: float, tokens: int) -> dict[str, Tensor]:
        return {"loss_sum": torch.tensor(nats), "loss_count": torch.tensor(tokens)}

    batches = [
        (outputs(6.0, 2), Micro(1)),
        (outputs(2.0, 6), Micro(4)),
        (outputs(0.0, 0), Micro(0)),
    ]
    assert measure(Metric.wrap(loss, "loss"), batches) == 1.0
    assert measure(Metric.wrap(bits_per_byte, "bits"), batches) == pytest.approx(1 / math.log(2))
    assert measure(Metric.wrap(perplexity, "perplexity"), batches) == pytest.approx(math.e)
    assert measure(Metric.wrap(perplexity, "perplexity"), [(outputs(1e4, 1), Micro(1))]) == math.inf


def test_sums_are_exact_where_float32_is_not() -> None:
    metric = Metric.wrap(loss, "loss")
    for value in (2.0**30, 1.0, 1.0):
        metric.update({"loss_sum": torch.tensor(value), "loss_count": torch.tensor(1)}, Micro(1))
    assert metric.sums().dtype == torch.float64
    assert metric.sums().tolist() == [2.0**30 + 2, 3]


class RootMeanSquare:
    """A class of the user's own, with a figure of its own."""

    def __call__(self, outputs: Mapping[str, Tensor], micro: Micro) -> Tensor:
        return outputs["error"].square()

    def finish(self, mean: float) -> float:
        return math.sqrt(mean)


def test_a_metric_of_the_users_own() -> None:
    batches = [({"error": torch.tensor([3.0, 4.0, 99.0])}, Micro(2))]
    expected = math.sqrt(12.5)
    assert measure(Metric.wrap(RootMeanSquare, "rms"), batches) == pytest.approx(expected)
    assert measure(Metric.wrap(RootMeanSquare(), "rms"), batches) == pytest.approx(expected)


def test_the_catalogue_resolves() -> None:
    for name in CATALOGUE["metric"]:
        assert Metric.wrap(resolve("metric", name), name).sums().tolist() == [0, 0]


@pytest.mark.parametrize(
    "result", [torch.tensor(1.0), torch.zeros(2, 2), torch.zeros(1), 0.5, None]
)
def test_what_is_neither_rows_nor_a_pair_is_refused(result: object) -> None:
    metric = Metric.wrap(lambda outputs, micro: result, "mine")
    with pytest.raises(UserError, match=r"metric mine: returned .* expected one value a row"):
        metric.update({}, Micro(2))


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"metric rmse: needs 'target' .* \(it gives logits\)"):
        Metric.wrap(RootMeanSquaredError, "rmse").update({"logits": torch.zeros(2, 2)}, Micro(2))
    with pytest.raises(UserError, match="expected a callable"):
        Metric.wrap(3, "three")
    with pytest.raises(UserError, match="nothing was counted"):
        Metric.wrap(loss, "loss").finish(0.0, 0.0)
