"""Averages of weights and ensembles of members, each against the hand computation (course C8)."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import cases
import ensemble_cases as ensemble
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from dist_train import checkpoint, ensembles, run, schedules, trained
from dist_train.errors import UserError
from dist_train.launch.cli import main
from dist_train.metrics import CalibrationError, Metric, brier
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, spawn_ranks, tiny_run
from dist_train.trained.ensemble import collect
from dist_train.trained.ensemble import ensemble as trained_ensemble
from dist_train.trained.export import export
from dist_train.trained.predict import predict
from dist_train.trained.seeds import train_seeds
from dist_train.world import World, pin_threads

STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]


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
    tied = torch.tensor([[[0.6, 0.4]], [[0.1, 0.9]]]).log()  # in float32 too
    assert ensembles.combined_log_probability(tied, "vote").argmax(1).tolist() == [1]
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
        2, ensemble.strategies_in_ranks, STRATEGIES, str(tiny_data), str(folder), timeout=240
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


# ---------------------------------------------------------------------------------------------------------------------
# Members by their seeds


@pytest.fixture(scope="module")
def seeds(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four members, each with a training set of its own, shared out over two ranks."""
    folder = tmp_path_factory.mktemp("seeds")
    recipe = cases.tiny_recipe("resnet", tiny_data, duration="8 steps")
    recipe = recipe.set("optimizer.learning_rate", 0.1).set("data.resample", "bootstrap")
    evaluate = {"split": "test", "every": "8 steps", "metrics": ["accuracy", "loss"]}
    recipe = recipe.set("evaluate", {**evaluate, "micro_batch": 7})
    result = train_seeds(recipe, 4, run_dir=folder / "four", ranks=2)
    return {"folder": folder, "recipe": recipe, "result": result}


def test_a_member_is_the_separate_run(seeds: dict[str, Any], tmp_path: Path) -> None:
    recipe = seeds["recipe"]
    for seed in (7, 10):
        alone = recipe.set("seed", seed).set("strategy", "single")
        run.train(alone, run_dir=tmp_path / f"{seed}")
        member = seeds["folder"] / "four" / f"seed-{seed}"
        assert_same_run(tmp_path / f"{seed}", member)
    digests = {
        checkpoint.weights_digest(seeds["folder"] / "four" / f"seed-{seed}")
        for seed in range(7, 11)
    }
    assert len(digests) == 4


def probabilities(seeds: dict[str, Any], tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each member, (M, N, K), and the labels, without anything of what combines them."""
    logits = []
    for seed in range(7, 11):
        member = seeds["folder"] / "four" / f"seed-{seed}"
        recipe = seeds["recipe"].set("strategy", "single")
        logits.append(member_logits(member, 8, recipe, tmp_path / str(seed)))
    with cases.trainer_of(recipe, World(), tmp_path / "labels") as trainer:
        label = torch.cat([micro["label"][: micro.real] for micro in trainer.evaluation])
    return torch.stack(logits).double().softmax(-1), label


def test_seeds_on_ranks_are_combined_as_by_hand(seeds: dict[str, Any], tmp_path: Path) -> None:
    p, label = probabilities(seeds, tmp_path)
    mean = p.mean(0)
    result = seeds["result"]
    together, members = result["together"], result["members"]
    assert [one["member"] for one in members] == [f"seed-{seed}" for seed in range(7, 11)]
    assert together["accuracy"] == float((mean.argmax(1) == label).double().mean())
    assert together["error"] == pytest.approx(1 - together["accuracy"])
    assert together["nll"] == pytest.approx(float(F.nll_loss(mean.log(), label)), rel=1e-6)
    for one, probability in zip(members, p, strict=True):
        nll = float(F.nll_loss(probability.log(), label))
        assert one["nll"] == pytest.approx(nll, rel=1e-6)
        assert one["accuracy"] == float((probability.argmax(1) == label).double().mean())
    chosen = p.argmax(-1)
    pairs = [(a, b) for a in range(4) for b in range(a)]
    apart = [float((chosen[a] != chosen[b]).double().mean()) for a, b in pairs]
    assert result["disagreement"] == pytest.approx(sum(apart) / 6)
    rows = [row for row in result["reliability"] if row["count"]]
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows]
    assert together["calibration_error"] == pytest.approx(sum(gaps) / len(label))
    assert (
        json.loads((seeds["folder"] / "four" / "ensemble.json").read_text())["together"] == together
    )


def test_the_command_gives_the_same(
    seeds: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(seeds["folder"] / "four" / f"seed-{seed}") for seed in range(7, 11)]
    out, plot = str(tmp_path / "out.csv"), str(tmp_path / "plot.png")
    assert main(["ensemble", *runs, "--out", out, "--plot", plot, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["together"] == pytest.approx(seeds["result"]["together"], rel=1e-6)
    p, label = probabilities(seeds, tmp_path)
    table = list(csv.DictReader(Path(out).read_text().splitlines()))
    assert len(table) == len(label) == 60
    for row, probability, right in zip(table, p.mean(0), label, strict=True):
        assert row["class"] == str(int(probability.argmax()))
        assert row["label"] == str(int(right))
        assert float(row["probability.3"]) == pytest.approx(float(probability[3]), abs=1e-6)
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    vote = trained_ensemble(runs[:3], how="vote")
    shares = F.one_hot(p[:3].argmax(-1), 10).double().mean(0)
    winner = (shares + 1e-9 * p[:3].mean(0)).argmax(1)
    assert vote["together"]["accuracy"] == float((winner == label).double().mean())
    brier_by_hand = float((shares - F.one_hot(label, 10)).square().sum(1).mean())
    assert vote["together"]["brier"] == pytest.approx(brier_by_hand, abs=1e-7)
    assert vote["together"]["nll"] is None  # some label has no vote at all
    assert main(["ensemble", *runs]) == 0
    printed = capsys.readouterr().out
    assert "together (mean)" in printed
    assert "disagreement: " in printed


def test_snapshots_by_the_command(snapshots: dict[str, Any]) -> None:
    """The members of a snapshot ensemble are its checkpoints."""
    folder = snapshots["folder"] / "run" / "checkpoints"
    found = trained_ensemble([folder / f"step-{step:08d}" for step in (4, 8, 12)])
    for name in ("accuracy", "nll", "brier"):
        expected = snapshots["results"][f"evaluate/ensemble/{name}"]
        assert found["together"][name] == pytest.approx(expected, rel=1e-6)


def test_seeds_resume(seeds: dict[str, Any], tmp_path: Path) -> None:
    """A member that was cut off goes on, those that are done stay, and the figures are the same."""
    folder = tmp_path / "four"
    shutil.copytree(seeds["folder"] / "four", folder)
    shutil.rmtree(folder / "seed-8")
    member = Recipe.load(folder / "seed-9")
    shutil.rmtree(folder / "seed-9")
    run.train(member, run_dir=folder / "seed-9", until=3)
    result = train_seeds(seeds["recipe"], 4, run_dir=folder, resume="auto")
    assert result["together"] == seeds["result"]["together"]
    assert_same_run(folder / "seed-8", seeds["folder"] / "four" / "seed-8")


def test_seeds_and_members_refuse(
    seeds: dict[str, Any], snapshots: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = seeds["recipe"]
    with pytest.raises(
        UserError, match=r"strategy: got zero1 with --seeds, expected single or ddp"
    ):
        train_seeds(recipe.set("strategy", "zero1"), 2, run_dir=tmp_path / "a")
    with pytest.raises(UserError, match="no evaluate section"):
        train_seeds(recipe.set("evaluate", None), 2, run_dir=tmp_path / "a")
    with pytest.raises(UserError, match=r"exists already: give another --run-dir"):
        train_seeds(recipe, 2, run_dir=seeds["folder"] / "four")
    with pytest.raises(UserError, match=r"--seeds: got 1, expected 2 or more"):
        train_seeds(recipe, 1, run_dir=tmp_path / "a")
    one = seeds["folder"] / "four" / "seed-7"
    text = tiny_run(cases.tiny_recipe("transformer", tiny_data), tmp_path / "text", steps=3)
    with pytest.raises(UserError, match=r"text: its recipe has no evaluate section"):
        trained_ensemble([one, text])
    with pytest.raises(UserError, match=r"out.csv: exists already"):
        (tmp_path / "out.csv").touch()
        trained_ensemble([one], out=tmp_path / "out.csv")
    with pytest.raises(UserError, match=r"is not a run directory"):
        trained_ensemble([tmp_path])


def line_recipe(folder: Path) -> Recipe:
    """A Gaussian about a line, from a table of 120 points."""
    from dist_train.data_shards.write import write_shards

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 3)).astype(np.float32)
    y = (50 + 10 * x[:, :1] + rng.normal(size=(120, 1))).astype(np.float32)
    rows = [
        ("test" if i % 4 == 0 else "train", f"{i:03d}", {"features.npy": a, "target.npy": b})
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    write_shards(folder / "shards", "line", iter(rows))
    return Recipe(
        duration="30 steps",
        strategy="single",
        threads=1,
        data={"path": str(folder / "shards"), "global_batch": 30, "micro_batch": 30},
        model={"name": "mlp", "in_features": 3, "num_outputs": 2, "depth": 1, "width": 8},
        objective={"name": "regression", "variance": "predicted"},
        optimizer={"name": "adam", "learning_rate": 0.03},
        evaluate={"split": "test", "every": "30 steps", "metrics": ["rmse", "nll", "loss"]},
        callbacks={"checkpoint": {"every": "30 steps"}},
    )


def test_a_mixture_of_regressions(tmp_path: Path) -> None:
    """Two members with predicted variance, against torch's mixture, and the better for it by the ambiguity."""
    recipe = line_recipe(tmp_path)
    result = train_seeds(recipe, 2, run_dir=tmp_path / "runs")
    mean, deviation = [], []
    for seed in (0, 1):
        trainer = trained.restore(tmp_path / "runs" / f"seed-{seed}")
        (outputs,), _ = collect(trainer, trainer.evaluation, "live")
        mean.append(outputs["prediction"][:, 0].double())
        deviation.append(outputs["deviation"][:, 0].double())
        target = outputs["target"][:, 0].double()
    parts = torch.distributions.Normal(torch.stack(mean, 1), torch.stack(deviation, 1))
    weights = torch.distributions.Categorical(torch.ones(len(target), 2))
    mixture = torch.distributions.MixtureSameFamily(weights, parts)
    together = result["together"]
    assert together["nll"] == pytest.approx(float(-mixture.log_prob(target).mean()), rel=1e-5)
    rmse = float((mixture.mean - target).square().mean().sqrt())
    assert together["rmse"] == pytest.approx(rmse, rel=1e-6)
    squares = [one["rmse"] ** 2 for one in result["members"]]
    assert sum(squares) / 2 - together["rmse"] ** 2 == pytest.approx(result["ambiguity"], rel=1e-6)
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in (0, 1)]
    found = trained_ensemble(runs, out=tmp_path / "out.csv")
    table = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert float(table[3]["prediction"]) == pytest.approx(float(mixture.mean[3]), rel=1e-5)
    assert float(table[3]["deviation"]) == pytest.approx(float(mixture.stddev[3]), rel=1e-4)
    assert found["together"] == pytest.approx(together, rel=1e-6)
    with pytest.raises(UserError, match="only classes are voted for"):
        trained_ensemble(runs, how="vote")


# ---------------------------------------------------------------------------------------------------------------------
# Members in one process


@pytest.fixture(scope="module")
def batched(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three members of a ResNet with batch norm, augmentation, bootstrap, decay and an average, as one run."""
    folder = tmp_path_factory.mktemp("batched")
    recipe = cases.tiny_recipe("resnet", tiny_data, duration="8 steps", strategy="single")
    evaluate = {"split": "test", "every": "8 steps", "metrics": ["accuracy", "nll"]}
    recipe = recipe.set("evaluate", {**evaluate, "micro_batch": 7}).set("log.every", "1 step")
    recipe = recipe.set("callbacks.clip_gradients", {"value": 0.05})
    recipe = recipe.set("data.resample", "bootstrap")
    recipe = recipe.set("init", {"name": "orthogonal"})
    result = run.train(recipe.set("members", 3), run_dir=folder / "three")
    for seed in (7, 8, 9):
        run.train(recipe.set("seed", seed), run_dir=folder / f"{seed}")
    run.train(recipe, run_dir=folder / "floor", micro_order="reversed")
    return {"folder": folder, "recipe": recipe, "results": result["results"]}


def test_members_of_a_batch_are_the_separate_runs(batched: dict[str, Any]) -> None:
    """Weights, running statistics and averages of member k are those of the run of seed + k to 1e-6, and its momentum
    within 10 times what another order of summation does to that."""
    floor = [
        checkpoint.Reader(checkpoint.resolve(batched["folder"] / name)) for name in ("7", "floor")
    ]
    momentum = floor[0].names("optimizer/")
    noise = ensemble.apart(*({n: reader.whole(n) for n in momentum} for reader in floor))
    assert noise > 0
    together = checkpoint.Reader(checkpoint.resolve(batched["folder"] / "three"))
    losses = []
    for number, seed in enumerate((7, 8, 9)):
        alone = checkpoint.Reader(checkpoint.resolve(batched["folder"] / f"{seed}"))
        assert len(alone.tensors) == len(together.tensors)
        ours = {n: together.whole(stacked(n))[number] for n in alone.tensors}
        theirs = {n: alone.whole(n) for n in alone.tensors}
        assert ensemble.apart(ours, {n: theirs[n] for n in momentum}) <= 10 * noise
        for name in set(theirs) - set(momentum):
            assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6), name
        losses.append([row["loss"] for row in RunDirectory(batched["folder"] / f"{seed}").rows()])
    rows = RunDirectory(batched["folder"] / "three").rows()
    for row, *each in zip(rows, *losses, strict=True):  # the row shows the members' mean
        assert row["loss"] == pytest.approx(sum(each) / 3, rel=1e-5)


def stacked(name: str) -> str:
    """What a tensor of a run is called where it has members."""
    return name.replace("/model.", "/model.network.")


def test_members_are_evaluated_together(batched: dict[str, Any], tmp_path: Path) -> None:
    """The run's own figures, the command's, and those of the separate runs, are the same."""
    folder = batched["folder"]
    apart = trained_ensemble([folder / f"{seed}" for seed in (7, 8, 9)])
    within = trained_ensemble([folder / "three"])
    for name in ("accuracy", "nll"):
        assert batched["results"][f"evaluate/{name}"] == pytest.approx(
            apart["together"][name], rel=1e-5
        )
    for one, two in zip(within["members"], apart["members"], strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)
    assert within["together"] == pytest.approx(apart["together"], rel=1e-5)
    three = folder / "three"
    assert [one["member"] for one in within["members"]] == [f"{three}:{k}" for k in range(3)]
    predict(three, batched["recipe"].data.path, tmp_path / "out.csv")
    table = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    total = sum(float(table[0][f"probability.{k}"]) for k in range(10))
    assert total == pytest.approx(1)


def test_members_are_exported_one_by_one(batched: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = export(batched["folder"] / "three", tmp_path / "members")["written"]
    assert sorted(written) == ["member-0", "member-1", "member-2"]
    export(batched["folder"] / "8", tmp_path / "one")
    one = load_file(tmp_path / "one" / "model.safetensors")
    own = load_file(tmp_path / "members" / "member-1" / "model.safetensors")
    assert own.keys() == one.keys()
    assert ensemble.apart(own, one) <= 1e-6
    found = export(batched["folder"] / "three", tmp_path / "pt2", format="pt2")
    assert max(found["differences"].values()) < 1e-4


def test_members_on_two_ranks(batched: dict[str, Any], tmp_path: Path) -> None:
    """Spread over ranks as any run is; resumed on one."""
    members = batched["recipe"].set("members", 3)
    once = run.train(members.set("strategy", "ddp"), run_dir=tmp_path / "ddp", ranks=2)["results"]
    for name, value in batched["results"].items():
        assert once[name] == pytest.approx(value, rel=1e-3), name
    run.train(members.set("strategy", "zero2"), run_dir=tmp_path / "zero2", ranks=2, until=4)
    run.train(members, run_dir=tmp_path / "zero2", resume="auto")
    truth = checkpoint.Reader(checkpoint.resolve(batched["folder"] / "three"))
    for kind in ("ddp", "zero2"):
        ours = checkpoint.Reader(checkpoint.resolve(tmp_path / kind))
        weights = {n: truth.whole(n) for n in truth.names("weights/")}
        assert ensemble.apart({n: ours.whole(n) for n in weights}, weights) <= 1e-4, kind


def test_heads_share_their_trunk(tiny_data: Path, tmp_path: Path) -> None:
    """The loss is the sum of the heads' losses over the same rows: by hand, with the gradient of trunk and heads."""
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single", duration="4 steps")
    recipe = recipe.set("callbacks.learning_rate_decay", None)
    recipe = recipe.set("members", {"count": 3, "heads": "classifier"})
    with cases.trainer_of(recipe, World(), tmp_path / "run") as trainer:
        network = trainer.engines["model"].player.networks["model"]
        micro, turn = trainer.data.batch(0)[0], trainer.objective.turns(0)[0]
        loss, logged = trainer.objective.loss(turn, trainer.seen_by(turn), micro, {})
        heads, network.classifier = network.classifier, torch.nn.Identity()
        features, network.classifier = network(micro["image"]), heads
        pairs = zip(heads.network.weight, heads.network.bias, strict=True)
        by_hand = torch.stack(
            [F.cross_entropy(features @ w.T + b, micro["label"]) for w, b in pairs]
        )
        assert float(loss) == pytest.approx(float(by_hand.sum()), rel=1e-6)
        assert float(logged["loss"]) == pytest.approx(float(by_hand.mean()), rel=1e-6)
        parameters = dict(network.named_parameters())
        ours = torch.autograd.grad(loss, list(parameters.values()))
        theirs = torch.autograd.grad(by_hand.sum(), list(parameters.values()))
        for name, a, b in zip(parameters, ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name
        plain = recipe.set("members", None)
        firsts = [ensemble.built(plain.set("seed", 7 + number)) for number in range(3)]
        for number, first in enumerate(firsts):
            assert torch.equal(heads.network.weight[number], first.classifier.weight)
        assert torch.equal(network.stem[0].weight, firsts[0].stem[0].weight)


def test_heads_resume_and_are_told_apart(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single", duration="4 steps")
    recipe = recipe.set("members", {"count": 3, "heads": "classifier"})
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    evaluate = {"split": "test", "every": "4 steps", "metrics": ["nll"]}
    recipe = recipe.set("evaluate", evaluate)
    run.train(recipe, run_dir=tmp_path / "whole")
    found = trained_ensemble([tmp_path / "whole"])
    assert len({one["nll"] for one in found["members"]}) == 3
    run.train(recipe, run_dir=tmp_path / "halves", until=2)
    run.train(recipe, run_dir=tmp_path / "halves", resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_members_are_planned(
    batched: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of three members computes what three steps do, and no strategy is offered that refuses them."""
    found = []
    for number in (None, 3):
        recipe = batched["recipe"].set("members", number).set("strategy", "ddp")
        (tmp_path / "members.yaml").write_text(recipe.to_yaml())
        assert main(["plan", str(tmp_path / "members.yaml"), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, three = found
    assert three["parameters"]["model"] == 3 * one["parameters"]["model"]
    assert "zero3" not in json.dumps(three["strategies"])


def test_members_of_a_regression(tmp_path: Path) -> None:
    """Targets of one number, each member with its own rows, with predicted variance and weight decay."""
    recipe = line_recipe(tmp_path).set("optimizer", {"name": "sgd", "learning_rate": 0.01})
    recipe = recipe.set("optimizer.weight_decay", 0.5).set("optimizer.momentum", 0.9)
    run.train(recipe.set("members", 2), run_dir=tmp_path / "two")
    train_seeds(recipe, 2, run_dir=tmp_path / "runs")
    together = checkpoint.Reader(checkpoint.resolve(tmp_path / "two"))
    for number in (0, 1):
        alone = checkpoint.Reader(checkpoint.resolve(tmp_path / "runs" / f"seed-{number}"))
        ours = {n: together.whole(stacked(n))[number] for n in alone.tensors}
        assert ensemble.apart(ours, {n: alone.whole(n) for n in alone.tensors}) <= 1e-5
    within = trained_ensemble([tmp_path / "two"])["together"]
    apart = json.loads((tmp_path / "runs" / "ensemble.json").read_text())["together"]
    assert within == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "zero3"}, r"strategy: got zero3 with members, expected single, ddp, zero1"),
        ({"strategy": "fsdp2"}, r"strategy: got fsdp2 with members, expected single, ddp, zero1"),
        ({"optimizer.name": "muon"}, r"optimizer: got muon with members"),
        ({"compile": True}, r"compile: got True, expected none with members"),
        ({"callbacks.clip_gradients": {"norm": 1.0}}, r"clip_gradients.norm: got 1.0 with members"),
        ({"members": 1}, r"members.count: got 1, expected a number of members"),
        (
            {"members": {"count": 3, "heads": "clasifier"}},
            r"heads: got 'clasifier', which is no la",
        ),
        ({"batch_norm": "synchronised"}, r"batch_norm: got 'synchronised', expected none"),
    ],
)
def test_members_refuse(
    batched: dict[str, Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    recipe = batched["recipe"].set("members", 3).set("init", None)
    with pytest.raises(UserError, match=message):
        for key, value in settings.items():
            recipe = recipe.set(key, value)
        run.train(recipe, run_dir=tmp_path / "run")


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
