"""Objectives and their metrics against closed forms; what is no mean is the same however a split is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.components import resolve
from dist_train.errors import UserError
from dist_train.metrics import Metric
from dist_train.models.mlp import MLP
from dist_train.networks import Networks
from dist_train.objectives import Turn
from dist_train.objectives.classification import Classification, cutmix, mixup
from dist_train.objectives.language_modelling import LanguageModelling
from dist_train.objectives.regression import Regression, gaussian_nll

TURN = Turn("model")


class Micro:
    """A micro-batch as an objective sees it."""

    def __init__(self, real: int | None = None, **fields: Tensor) -> None:
        self.fields = fields
        self.ids = range(len(next(iter(fields.values()))))
        self.real = len(self.ids) if real is None else real

    def __getitem__(self, field: str) -> Tensor:
        return self.fields[field]

    def rows(self, start: int, stop: int, real: int | None = None) -> Micro:
        return Micro(real, **{name: value[start:stop] for name, value in self.fields.items()})


def loss_of(objective: Any, model: nn.Module, micro: Micro) -> Tensor:
    return objective.loss(TURN, Networks({"model": model}), micro, {})[0]


def figure(name: str, outputs: dict[str, Tensor], micro: Micro) -> float:
    """A metric over all rows at once, and again over pieces of unequal size on two 'ranks', one with padding."""
    whole = Metric.wrap(resolve("metric", name), name)
    whole.update(outputs, micro)
    size = len(micro.ids)
    ranks = []
    for pieces in ([(0, 5)], [(5, 7), (7, size)]):
        metric = Metric.wrap(resolve("metric", name), name)
        for start, stop in pieces:
            part = {key: torch.cat([v[start:stop], v[:1]]) for key, v in outputs.items()}
            rows = {key: torch.cat([v[start:stop], v[:1]]) for key, v in micro.fields.items()}
            metric.update(part, Micro(stop - start, **rows))  # the last row is padding
        ranks.append(metric.sums())
    value = whole.finish(*whole.sums().tolist())
    assert metric.finish(*(ranks[0] + ranks[1]).tolist()) == pytest.approx(value, rel=1e-12)
    return value


# Classification


def test_gradient_of_softmax_regression_is_its_closed_form() -> None:
    """F1: d loss / d logits = softmax(z) - y, averaged over the samples; so of the weights (softmax(z) - y) x."""
    torch.manual_seed(0)
    model = MLP(6, 4, depth=0).double()
    micro = Micro(
        image=torch.randn(9, 6, dtype=torch.float64),
        label=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0]),
    )
    loss = loss_of(Classification(), model, micro)
    loss.backward()
    logits = model(micro["image"])
    gap = (logits.softmax(1) - nn.functional.one_hot(micro["label"], 4)) / 9
    torch.testing.assert_close(model.output.weight.grad, gap.T @ micro["image"])
    torch.testing.assert_close(model.output.bias.grad, gap.sum(0))
    likelihood = logits.softmax(1).gather(1, micro["label"][:, None]).log().mean()
    torch.testing.assert_close(loss, -likelihood)


def test_label_smoothing_is_its_formula() -> None:
    torch.manual_seed(0)
    logits, label, s = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0]), 0.1
    target = (1 - s) * nn.functional.one_hot(label, 3) + s / 3
    loss = loss_of(
        Classification(label_smoothing=s), nn.Identity(), Micro(image=logits, label=label)
    )
    torch.testing.assert_close(loss, -(target * logits.log_softmax(1)).sum(1).mean())


def test_mixup_blends_images_and_losses_alike() -> None:
    x, other = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    assert torch.all(mixup(x, other, 0.7) == 1 - 0.7)
    torch.manual_seed(0)
    logits, label = torch.randn(64, 3), torch.arange(64) % 3
    micro = Micro(image=logits, label=label)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(
            seed
        )  # law 2: the trainer seeds the default generator for each micro-batch
        return loss_of(Classification(mixup=0.4), nn.Identity(), micro)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    torch.manual_seed(3)
    order = torch.randperm(64)
    share = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample().item()
    mixed = share * logits + (1 - share) * logits[order]
    expected = share * nn.functional.cross_entropy(mixed, label)
    expected = expected + (1 - share) * nn.functional.cross_entropy(mixed, label[order])
    torch.testing.assert_close(draw(3), expected)


@pytest.mark.parametrize("place", [(0.5, 0.5), (0.0, 0.99), (0.3, 0.0)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_returns_the_share_that_is_left(place: tuple[float, float], share: float) -> None:
    x, other = torch.zeros(3, 2, 20, 30), torch.ones(3, 2, 20, 30)
    mixed, left = cutmix(x, other, share, torch.tensor(place))
    assert left == pytest.approx(1 - mixed.mean().item())
    assert left >= share - 1e-9
    if place == (0.5, 0.5):
        assert left == pytest.approx(share, abs=0.08)  # pixels are whole
    assert torch.all(x == 0)


def test_cutmix_and_mixup_take_turns() -> None:
    micro = Micro(image=torch.randn(8, 1, 6, 6), label=torch.arange(8) % 2)
    seen = []

    def model(image: Tensor) -> Tensor:
        same = torch.stack([(image == one).float().mean((1, 2, 3)) for one in micro["image"]])
        seen.append(
            bool((same.max(0).values > 0.05).all())
        )  # pasted pixels are there, blended ones not
        return image.mean((1, 2, 3))[:, None].expand(8, 2)

    for seed in range(40):
        torch.manual_seed(seed)
        loss_of(Classification(mixup=0.5, cutmix=1.0), model, micro)  # type: ignore[arg-type]
    assert 8 <= sum(seen) <= 36


def test_classification_metrics_are_their_definitions() -> None:
    torch.manual_seed(0)
    logits, label = 2 * torch.randn(23, 4), torch.randint(4, (23,))
    micro = Micro(image=logits, label=label)
    outputs = Classification().evaluate(Networks({"model": nn.Identity()}), micro)  # type: ignore[arg-type]
    outputs = {name: value for name, value in outputs.items() if value.ndim}
    probabilities = logits.double().softmax(1)
    wrong = logits.argmax(1) != label
    assert figure("error", outputs, micro) == pytest.approx(wrong.double().mean().item())
    rank = (logits > logits.gather(1, label[:, None])).sum(1)
    assert figure("top_2", outputs, micro) == pytest.approx((rank < 2).double().mean().item())
    assert figure("top_5", outputs, micro) == 1.0
    nats = -probabilities.gather(1, label[:, None]).log().mean().item()
    assert figure("nll", outputs, micro) == pytest.approx(nats, rel=1e-6)
    gap, (confidence, chosen) = 0.0, probabilities.max(1)
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (chosen == label)[inside].double().mean()
            gap += float((confidence[inside].mean() - right).abs() * inside.double().mean())
    assert figure("calibration_error", outputs, micro) == pytest.approx(gap)


# Regression


def test_gaussian_nll_at_variance_1_is_half_the_squared_error() -> None:
    """F2."""
    torch.manual_seed(0)
    mean, target = torch.randn(2, 30, dtype=torch.float64)
    nll = gaussian_nll(mean, torch.zeros(30, dtype=torch.float64), target).mean()
    expected = nn.functional.mse_loss(mean, target) / 2 + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(nll, expected)


def test_gaussian_nll_is_torchs_and_its_gradient_is_right() -> None:
    torch.manual_seed(0)
    mean, log_variance, target = torch.randn(3, 12, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    torch.testing.assert_close(gaussian_nll(mean, log_variance, target), -normal.log_prob(target))
    mean.requires_grad_(), log_variance.requires_grad_(), target.requires_grad_()
    assert torch.autograd.gradcheck(gaussian_nll, (mean, log_variance, target))


STATISTICS = {"target": {"mean": [150.0, -2.0], "std": [75.0, 0.5]}}


@pytest.mark.parametrize("variance", ["fixed", "predicted"])
def test_regression_trains_on_standardised_targets_and_tells_its_own_units(variance: str) -> None:
    torch.manual_seed(0)
    scale = torch.tensor(STATISTICS["target"]["std"])
    shift = torch.tensor(STATISTICS["target"]["mean"])
    target = torch.randn(23, 2) * scale + shift
    output = torch.randn(23, 4 if variance == "predicted" else 2)
    micro = Micro(features=output, target=target)
    objective = Regression(variance, statistics=STATISTICS)
    networks = Networks({"model": nn.Identity()})
    outputs = objective.evaluate(networks, micro)  # type: ignore[arg-type]
    mean = output[:, :2] * scale + shift
    torch.testing.assert_close(outputs["prediction"], mean)
    deviation = (
        (0.5 * output[:, 2:]).exp() * scale if variance == "predicted" else scale.expand(23, 2)
    )
    torch.testing.assert_close(outputs["deviation"], deviation)
    nll = -torch.distributions.Normal(mean, deviation).log_prob(target).sum(1)
    torch.testing.assert_close(outputs["nll"], nll)
    loss = loss_of(objective, nn.Identity(), micro)
    mean_nll = (nll - scale.log().sum()).mean() / 2
    squared = ((target - mean) / scale).square().mean()
    torch.testing.assert_close(loss, mean_nll if variance == "predicted" else squared)
    torch.testing.assert_close(outputs["loss_sum"] / outputs["loss_count"], loss.double())

    rows = {name: outputs[name] for name in ("prediction", "target", "nll")}
    errors = (target - mean).double()
    deviations = (target - target.mean(0)).double()
    r2 = 1 - float(errors.square().sum() / deviations.square().sum())
    assert figure("r2", rows, micro) == pytest.approx(r2, rel=1e-6)
    assert figure("rmse", rows, micro) == pytest.approx(float(errors.square().mean().sqrt()))
    assert figure("nll", rows, micro) == pytest.approx(nll.double().mean().item())


def test_a_number_a_sample_is_a_column() -> None:
    torch.manual_seed(0)
    statistics = {"target": {"mean": [2.0], "std": [3.0]}}
    output, target = torch.randn(2, 23, 1)
    objective = Regression(statistics=statistics)
    networks = Networks({"model": nn.Identity()})
    column = objective.evaluate(networks, Micro(features=output, target=target))  # type: ignore[arg-type]
    flat = objective.evaluate(networks, Micro(features=output, target=target[:, 0]))  # type: ignore[arg-type]
    assert all(torch.equal(flat[name], value) for name, value in column.items())
    with pytest.raises(UserError, match=r"'target' is \(23, 1, 1\), expected \(B, D\) or \(B,\)"):
        loss_of(objective, nn.Identity(), Micro(features=output, target=target[:, None]))


def test_chunk_with_a_model_that_gives_logits_is_one_line() -> None:
    micro = Micro(tokens=torch.zeros(2, 5, dtype=torch.long), length=torch.tensor([4, 4]))
    with pytest.raises(UserError, match=r"objective\.chunk: asks the model for .* leave chunk out"):
        loss_of(LanguageModelling(chunk=4), nn.Embedding(3, 3), micro)


def test_constant_variance_is_beaten_by_no_other_constant() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 23, 1, dtype=torch.float64)
    rows = {"prediction": prediction, "target": target}
    best = figure("constant_variance_nll", rows, Micro(target=target))
    for factor in (0.5, 0.9, 1.0, 1.1, 2.0):
        deviation = (target - prediction).square().mean().sqrt() * factor
        nll = -torch.distributions.Normal(prediction, deviation).log_prob(target).mean()
        assert best <= nll + 1e-12
        assert factor != 1.0 or best == pytest.approx(nll.item())


def test_mistakes_are_named() -> None:
    with pytest.raises(
        UserError, match="variance: got 'learned', expected one of fixed, predicted"
    ):
        Regression("learned")
    with pytest.raises(UserError, match="no statistics of 'targets', did you mean 'target'"):
        Regression(target="targets", statistics=STATISTICS)
    micro = Micro(features=torch.zeros(3, 1), target=torch.zeros(3, 1))
    with pytest.raises(
        UserError, match=r"gives \(3, 1\), but 1 targets with predicted variance need \(3, 2\)"
    ):
        loss_of(Regression("predicted"), nn.Identity(), micro)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        Classification(label_smoothing=1.0)
    with pytest.raises(ValueError, match="mixup and cutmix are 0 or more"):
        Classification(mixup=-1.0)


def test_confusion_counts_each_sample_once(tiny_data: Path, tmp_path: Path) -> None:
    """On two ranks, with padding in the last micro-batch: the diagonal is the accuracy, and a row a class's samples."""
    import cases

    from dist_train.report import write_report
    from dist_train.run_directory import RunDirectory
    from dist_train.testing import spawn_ranks

    spawn_ranks(2, cases.confusion_run, str(tiny_data), str(tmp_path / "run"), timeout=240)
    (row,) = [r for r in RunDirectory.open(tmp_path / "run").rows() if "confusion" in r]
    counts = torch.tensor(row["confusion"])
    assert counts.sum() == 60
    assert counts.diagonal().sum().item() / 60 == pytest.approx(row["evaluate/accuracy"])
    assert (tmp_path / "run" / row["images"]["confusion"]).is_file()
    page = write_report([tmp_path / "run"]).read_text()
    assert "<h2>Confusion" in page
