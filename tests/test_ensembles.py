"""Averages of weights and ensembles of members, each against the hand computation (course C8)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cases
import ensemble_cases as ensemble
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from dist_train import checkpoint, ensembles, run, schedules, trained
from dist_train.errors import UserError
from dist_train.metrics import CalibrationError, Metric, brier
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, spawn_ranks
from dist_train.trained.export import export
from dist_train.world import World, pin_threads

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pin_threads(1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Combinations


def test_mean_probability_and_vote_by_hand() -> None:
    """Three members, two rows: the mean of the probabilities, and shares of the votes."""
    p = torch.tensor(
        [
            [[0.6, 0.3, 0.1], [0.4, 0.6, 0.0]],
            [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4]],
            [[0.0, 0.9, 0.1], [0.8, 0.1, 0.1]],
        ],
        dtype=torch.float64,
    )
    mean = ensembles.combined_log_probability(p.log(), "mean").exp()
    expected = torch.tensor([[1.1, 1.6, 0.3], [1.5, 1.0, 0.5]], dtype=torch.float64) / 3
    assert torch.allclose(mean, expected, rtol=0, atol=1e-12)
    vote = ensembles.combined_log_probability(p.log(), "vote")
    shares = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64) / 3
    assert torch.allclose(vote.exp(), shares, rtol=0, atol=1e-8)
    assert vote.argmax(1).tolist() == [0, 0]  # of row 1 all have one vote, and the mean decides
    assert mean.argmax(1).tolist() == [1, 0]
    chosen = p.argmax(-1)
    assert chosen.tolist() == [[0, 1], [0, 2], [1, 0]]
    assert ensembles.disagreement(chosen) == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(
        UserError, match=r"how: got 'votes', expected one of mean, vote, did you mean 'vote'"
    ):
        ensembles.combined_log_probability(p.log(), "votes")


def test_a_mixture_of_gaussians_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 7, 1, generator=generator, dtype=torch.float64)
    deviation = torch.rand(5, 7, 1, generator=generator, dtype=torch.float64) + 0.1
    target = torch.randn(7, 1, generator=generator, dtype=torch.float64)
    weights = torch.distributions.Categorical(torch.ones(7, 5))
    parts = torch.distributions.Normal(mean[..., 0].T, deviation[..., 0].T)
    mixture = torch.distributions.MixtureSameFamily(weights, parts)
    together, spread = ensembles.mixture_moments(mean, deviation)
    assert torch.allclose(together[:, 0], mixture.mean, atol=1e-6)
    assert torch.allclose(spread[:, 0].square(), mixture.variance, atol=1e-6)
    nll = -torch.distributions.Normal(mean, deviation).log_prob(target)[..., 0]  # (M, B)
    mixed = -ensembles.log_mean_probability(-nll)
    assert torch.allclose(mixed, -mixture.log_prob(target[:, 0]), atol=1e-6)


def test_the_mean_is_better_by_the_ambiguity() -> None:
    """Krogh and Vedelsby 1995: the mean's squared error is the members' mean error less the ambiguity, exactly."""
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randn(5, 40, 2, generator=generator, dtype=torch.float64)
    target = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    members = (prediction - target).square().mean()
    mean = (prediction.mean(0) - target).square().mean()
    assert float(members - mean) == pytest.approx(ensembles.ambiguity(prediction), rel=1e-12)


def test_calibration_against_a_closed_form() -> None:
    """A classifier that says c and is right with probability c - 0.1: its error is 0.1, in each bin that has rows."""
    confidence = torch.tensor([0.62, 0.75, 0.95], dtype=torch.float64).repeat_interleave(1000)
    probability = torch.stack([confidence, 1 - confidence], dim=1)
    label = torch.ones(3000, dtype=torch.int64)  # wrong, but for so many of each thousand
    for block, sure in enumerate((0.62, 0.75, 0.95)):
        label[block * 1000 : block * 1000 + round((sure - 0.1) * 1000)] = 0
    rows = ensembles.reliability(probability, label, bins=10)
    filled = [row for row in rows if row["count"]]
    assert [row["from"] for row in filled] == [0.6, 0.7, 0.9]
    for row in filled:
        assert row["confidence"] - row["accuracy"] == pytest.approx(0.1, abs=1e-12)
    assert sum(row["count"] for row in rows) == 3000
    metric = Metric.wrap(CalibrationError, "ece")
    micro = Micro({"label": label})
    metric.update({"logits": probability.log()}, micro)
    assert metric.finish(*metric.sums().tolist()) == pytest.approx(0.1, abs=1e-12)
    score = Metric.wrap(brier, "brier")
    score.update({"logits": probability.log()}, micro)
    one_hot = F.one_hot(label, 2)
    by_hand = (probability - one_hot).square().sum(1).mean()
    assert score.finish(*score.sums().tolist()) == pytest.approx(float(by_hand), rel=1e-12)


class Micro(dict):  # type: ignore[type-arg]
    """Rows of which all count."""

    @property
    def real(self) -> int:
        return len(self["label"])


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_the_schedule_of_swa() -> None:
    """1 until half of `start`, linear to `end` at nine tenths of it, constant; or cycles that fall from 1 to `end`."""
    flat = schedules.build("swa", 200, start=100, end=0.1)
    assert [flat(step) for step in (0, 49, 50)] == [1.0, 1.0, 1.0]
    assert flat(70) == pytest.approx(0.55)
    assert [flat(step) for step in (90, 100, 199)] == pytest.approx([0.1, 0.1, 0.1])
    cyclic = schedules.build("swa", 200, start=100, end=0.1, cycle=4)
    falling = [0.775, 0.55, 0.325, 0.1]  # (1 - t) + 0.1 t at t = 1/4, 2/4, 3/4, 1
    assert [cyclic(step) for step in range(100, 108)] == pytest.approx(falling * 2)
    assert cyclic(99) == pytest.approx(0.1)


@pytest.mark.parametrize(("total", "cycles"), ((12, 3), (10, 4)))
def test_the_schedule_of_snapshots(total: int, cycles: int) -> None:
    """Equation 2 of Huang et al. where cycles divide the run; else cycles of almost equal lengths that end with it."""
    value = schedules.build("cyclic_cosine", total, cycles=cycles)
    ends = schedules.cycle_ends(total, cycles)
    assert ends == [total * (i + 1) // cycles for i in range(cycles)]
    if total % cycles == 0:
        length = total // cycles
        for step in range(total):
            expected = (math.cos(math.pi * (step % length) / length) + 1) / 2
            assert value(step) == pytest.approx(expected), step
    assert [value(step) for step in (0, *ends[:-1])] == [1.0] * cycles
    assert all(value(end - 1) < 0.6 for end in ends)


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic weight averaging


@pytest.fixture(scope="module")
def averaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's run with its averages, and what two ranks find under each strategy."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("swa")
    recipe = ensemble.swa_recipe(str(tiny_data), strategy="single")
    ours = ensemble.averaged(recipe, World(), folder / "one")
    save_file(ours, folder / "one.safetensors")
    ranks = spawn_ranks(
        2, ensemble.strategies_in_ranks, STRATEGIES, str(tiny_data), str(folder), timeout=120
    )[0]
    return {"folder": folder, "recipe": recipe, "ours": ours, "ranks": ranks}


def test_swa_is_the_mean_of_the_checkpoints(averaged: dict[str, Any]) -> None:
    hand = ensemble.mean_of_checkpoints(averaged["folder"] / "one")
    assert ensemble.apart(averaged["ours"], hand) <= 1e-6
    last = ensemble.mean_of_checkpoints(averaged["folder"] / "one", (10,))
    assert ensemble.apart(averaged["ours"], last) > 1e-3


def test_running_statistics_are_those_of_the_set(
    averaged: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """torch's update_bn over the first three batches, micro-batch by micro-batch, in the averaged network."""
    with cases.trainer_of(averaged["recipe"], World(), tmp_path / "run") as trainer:
        images = [micro["image"] for step in range(3) for micro in trainer.data.batch(step)]
        network = trainer.engines["model"].player.networks["model"]
    prefix = "model."
    state = {name.removeprefix(prefix): t for name, t in averaged["ours"].items()}
    network.load_state_dict(state)
    update_bn(images, network)
    expected = {n: b for n, b in network.named_buffers() if ".running_" in n}
    assert len(expected) > 10
    assert ensemble.apart(state, expected) <= 1e-6
    live = checkpoint.Reader(checkpoint.resolve(averaged["folder"] / "one"))
    moved = {n: live.whole(f"buffers/{prefix}{n}") for n in expected}
    assert ensemble.apart(state, moved) > 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_swa_is_the_same_on_two_ranks(averaged: dict[str, Any], strategy: str) -> None:
    found = averaged["ranks"][strategy]
    assert found["from_hand"] <= 1e-6
    assert found["from_one"] <= 1e-4  # ten steps apart by the order of summation
    assert found["statistics"] <= 1e-4


def test_swa_resumes_bit_for_bit(averaged: dict[str, Any], tmp_path: Path) -> None:
    recipe = averaged["recipe"].set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    run.train(recipe, run_dir=tmp_path / "whole")
    run.train(recipe, run_dir=tmp_path / "halves", until=5)
    run.train(recipe, run_dir=tmp_path / "halves", resume="auto", until=6)
    run.train(recipe, run_dir=tmp_path / "halves", resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    reader = checkpoint.Reader(checkpoint.resolve(tmp_path / "halves"))
    for name, tensor in averaged["ours"].items():
        if tensor.is_floating_point():
            assert torch.equal(reader.whole(f"callbacks/swa/{name}"), tensor), name


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_averages_in_half_precision(tiny_data: Path, tmp_path: Path, precision: str) -> None:
    """Weights are fp32 all the same, and so are their mean and its statistics."""
    recipe = ensemble.swa_recipe(str(tiny_data), strategy="single", precision=precision)
    ours = ensemble.averaged(recipe, World(), tmp_path / "run")
    assert ensemble.apart(ours, ensemble.mean_of_checkpoints(tmp_path / "run")) <= 1e-6
    assert all(t.dtype == torch.float32 for t in ours.values() if t.is_floating_point())
    assert all(torch.isfinite(t).all() for t in ours.values())


def test_swa_of_several_players(tiny_data: Path, tmp_path: Path) -> None:
    """Each player's weights at the same steps, whoever had a turn."""
    recipe = ensemble.swa_recipe(str(tiny_data), "wgan_gp", strategy="single")
    ours = ensemble.averaged(recipe, World(), tmp_path / "run")
    hand = ensemble.mean_of_checkpoints(tmp_path / "run")
    assert {name.partition(".")[0] for name in hand} == {"generator", "critic"}
    assert ensemble.apart(ours, hand) <= 1e-6


def test_swa_is_evaluated_and_exported(tiny_data: Path, tmp_path: Path) -> None:
    """The row's figures are those of the averaged network; a resumed, restored or exported run has the same."""
    evaluate = {"split": "test", "every": "10 steps", "metrics": ["loss"], "weights": "swa"}
    recipe = ensemble.swa_recipe(str(tiny_data), strategy="single").set("evaluate", evaluate)
    result = run.train(recipe, run_dir=tmp_path / "run")
    assert trained.evaluate(tmp_path / "run")["results"]["loss"] == pytest.approx(
        result["results"]["evaluate/loss"], rel=1e-12
    )
    assert export(tmp_path / "run", tmp_path / "out")["weights"] == "swa"
    from safetensors.torch import load_file

    written = load_file(tmp_path / "out" / "model.safetensors")
    hand = ensemble.mean_of_checkpoints(tmp_path / "run")
    plain = {name.removeprefix("model."): tensor for name, tensor in hand.items()}
    assert ensemble.apart(written, plain) <= 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "11 steps"}, r"start: '11 steps' is step 11, expected one of the run's 10"),
        ({"start": "4"}, r"swa.start: got '4', expected a positive number and a unit"),
        ({"start": "4 steps", "cycle": "2 model turns"}, r"swa.cycle: got '2 model turns'"),
    ],
)
def test_swa_refuses(
    tiny_data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    recipe = ensemble.swa_recipe(str(tiny_data), strategy="single").set("callbacks.swa", settings)
    with pytest.raises(UserError, match=message):
        run.train(recipe, run_dir=tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots


@pytest.fixture(scope="module")
def snapshots(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of three cycles over 12 steps that keeps one checkpoint beside its members."""
    folder = tmp_path_factory.mktemp("snapshots")
    recipe = cases.tiny_recipe("resnet", tiny_data, duration="12 steps", strategy="single")
    evaluate = {"split": "test", "every": "12 steps", "metrics": ["accuracy", "nll", "brier"]}
    recipe = recipe.set("evaluate", evaluate).set("optimizer.learning_rate", 0.05)
    recipe = recipe.set("callbacks.checkpoint", {"every": "1 step", "keep": 1})
    schedule = {"schedule": {"name": "cyclic_cosine", "cycles": 3}}
    recipe = recipe.set("callbacks.learning_rate_decay", schedule)
    recipe = recipe.set("callbacks.snapshots", {"name": "snapshot_ensemble", "cycles": 3})
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    result = run.train(recipe, run_dir=folder / "run")
    return {"folder": folder, "recipe": recipe, "results": result["results"]}


def member_logits(run_dir: Path, step: int, recipe: Any, tmp_path: Path) -> torch.Tensor:
    """What the network of a checkpoint says of the test split, (N, K)."""
    reader = checkpoint.Reader(checkpoint.at(run_dir / "checkpoints", step))
    with cases.trainer_of(recipe, World(), tmp_path / f"member-{step}") as trainer:
        network = trainer.engines["model"].player.networks["model"]
        evaluation = list(trainer.evaluation)
    for kind in ("weights", "buffers"):
        state = {n.partition("model.")[2]: reader.whole(n) for n in reader.names(f"{kind}/")}
        network.load_state_dict(state, strict=False)
    network.eval()
    with torch.no_grad():
        return torch.cat([network(micro["image"])[: micro.real] for micro in evaluation])


def test_members_are_kept_and_evaluated_together(snapshots: dict[str, Any], tmp_path: Path) -> None:
    folder, recipe = snapshots["folder"] / "run", snapshots["recipe"]
    assert checkpoint.steps(folder / "checkpoints") == [4, 8, 12]
    logits = torch.stack([member_logits(folder, s, recipe, tmp_path) for s in (4, 8, 12)])
    with cases.trainer_of(recipe, World(), tmp_path / "labels") as trainer:
        label = torch.cat([micro["label"][: micro.real] for micro in trainer.evaluation])
    probability = logits.double().softmax(-1).mean(0)
    expected = {
        "accuracy": float((probability.argmax(1) == label).double().mean()),
        "nll": float(F.nll_loss(probability.log(), label)),
        "brier": float((probability - F.one_hot(label, 10)).square().sum(1).mean()),
    }
    for name, value in expected.items():
        assert snapshots["results"][f"evaluate/ensemble/{name}"] == pytest.approx(value, rel=1e-6)
    assert snapshots["results"]["evaluate/nll"] != pytest.approx(expected["nll"], rel=1e-4)


def test_snapshots_resume_bit_for_bit(snapshots: dict[str, Any], tmp_path: Path) -> None:
    run.train(snapshots["recipe"], run_dir=tmp_path / "run", until=6)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 6]
    result = run.train(snapshots["recipe"], run_dir=tmp_path / "run", resume="auto")
    assert_same_run(snapshots["folder"] / "run", tmp_path / "run")
    assert result["results"] == snapshots["results"]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 8, 12]


def test_snapshots_on_two_ranks(snapshots: dict[str, Any], tmp_path: Path) -> None:
    recipe = snapshots["recipe"].set("strategy", cases.strategy("zero3"))
    results = run.train(recipe, run_dir=tmp_path / "run", ranks=2)["results"]
    for name, value in snapshots["results"].items():
        assert results[name] == pytest.approx(value, rel=1e-3), name


def test_snapshots_refuse(snapshots: dict[str, Any], tiny_data: Path) -> None:
    recipe = snapshots["recipe"]
    with pytest.raises(UserError, match=r"snapshot_ensemble: needs callbacks.checkpoint"):
        recipe.set("callbacks.checkpoint", None).check_components()
    with pytest.raises(UserError, match=r"cycles must be 2 or more, got 1"):
        recipe.set("callbacks.snapshots.cycles", 1).check_components()
    text = cases.tiny_recipe("transformer", tiny_data)
    text = text.set("callbacks.snapshot_ensemble", {}).set(
        "evaluate", {"split": "test", "every": "1 epoch", "metrics": ["loss"]}
    )
    with pytest.raises(UserError, match="objective 'language_modelling' combines no members"):
        text.check_components()


def test_interrupted_in_the_statistics(
    averaged: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end while running statistics are taken: the next start takes them again, and it is the same run."""
    from dist_train.errors import Interrupted
    from dist_train.trainer import Trainer

    recipe = averaged["recipe"].set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    asked: list[int] = []
    leave = Trainer.leave_if_told

    def told(trainer: Trainer) -> None:
        asked.append(trainer.step)
        if asked.count(6) == 2:
            monkeypatch.setattr(Trainer, "leave_if_told", leave)
            trainer.interruption.reason, trainer.interruption.code = "told", 75
            monkeypatch.setattr(trainer.interruption, "reached", lambda: True)
        leave(trainer)

    monkeypatch.setattr(Trainer, "leave_if_told", told)
    with pytest.raises(Interrupted):
        run.train(recipe, run_dir=tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 6
    run.train(recipe, run_dir=tmp_path / "run", resume="auto")
    whole = RunDirectory(tmp_path / "run")
    assert [row["step"] for row in whole.rows()] == sorted({row["step"] for row in whole.rows()})
    run.train(recipe, run_dir=tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
