"""Callbacks against closed forms and hand computations, and the ways to start, stop and go on with a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import engine_cases
import pytest
import torch
import torch.nn.functional as F

from dist_train import checkpoint
from dist_train.callbacks.checkpoint import CheckpointCallback
from dist_train.callbacks.clip_gradients import ClipGradients
from dist_train.callbacks.early_stopping import EarlyStopping
from dist_train.callbacks.ema import ExponentialMovingAverage
from dist_train.errors import UserError
from dist_train.objectives import Turn
from dist_train.run import train
from dist_train.testing import assert_same_run, read_trace, sample_ids, spawn_ranks, tiny_run
from dist_train.world import World, pin_threads


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pin_threads(1, 1)


@pytest.fixture(scope="module")
def ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What one, two and three ranks find; the one is this process."""
    folder = tmp_path_factory.mktemp("callbacks")
    engine_cases.pack_few(folder)
    few = str(folder / "few")
    world = World()
    found: dict[int, dict[str, Any]] = {
        1: {
            "folder": folder,
            "digits": engine_cases.evaluate_in(world, str(tiny_data / "digits"), 7, folder),
            "few": engine_cases.evaluate_in(world, few, 1, folder),
            "average": {
                f"{model}-single": engine_cases.average_in(
                    world, model, "single", str(tiny_data), folder
                )
                for model in ("resnet", "wgan_gp")
            },
            "stopped": train(
                engine_cases.stopping_recipe(str(tiny_data)), run_dir=folder / "stopped-1"
            ),
        }
    }
    for count in (2, 3):
        found[count] = spawn_ranks(
            count, engine_cases.callbacks_in_ranks, str(tiny_data), few, str(folder), timeout=240
        )[0]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize(("data", "samples"), (("digits", 60), ("few", 2)))
@pytest.mark.parametrize("count", (1, 2, 3))
def test_every_sample_is_evaluated_once(
    ranks: dict[int, dict[str, Any]], count: int, data: str, samples: int
) -> None:
    """60 samples in micro-batches of 7; and 2 samples on 3 ranks."""
    assert ranks[count][data]["ids"] == list(range(samples))
    truth = ranks[1][data]["results"]
    for name, value in ranks[count][data]["results"].items():
        assert value == pytest.approx(truth[name], rel=1e-12), name


def test_metrics_equal_plain_torch(
    ranks: dict[int, dict[str, Any]], tiny_data: Path, tmp_path: Path
) -> None:
    evaluate = {"split": "test", "every": "1 step", "metrics": ["accuracy"], "micro_batch": 60}
    recipe = cases.tiny_recipe("resnet", tiny_data, micro_batches=12, evaluate=evaluate)
    with cases.trainer_of(recipe, World(), tmp_path / "run") as trainer:
        whole = next(iter(trainer.evaluation))
        module = trainer.engines["model"].player.networks["model"].eval()
        with torch.no_grad():
            logits = module(whole["image"])
    assert whole.real == 60
    results = ranks[1]["digits"]["results"]
    assert results["accuracy"] == (logits.argmax(1) == whole["label"]).sum().item() / 60
    assert results["loss"] == pytest.approx(
        float(F.cross_entropy(logits, whole["label"])), abs=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# Averages


AVERAGES = [(1, "resnet-single"), (1, "wgan_gp-single"), (2, "resnet-zero2"), (2, "wgan_gp-zero3")]


@pytest.mark.parametrize(("count", "case"), AVERAGES)
def test_ema_equals_the_hand_computation(
    ranks: dict[int, dict[str, Any]], count: int, case: str
) -> None:
    """Weights and running statistics, d = min(0.5, (1 + t) / (10 + t)), each player by its own turns."""
    found = ranks[count]["average"][case]
    turns = {"model": 12} if case.startswith("resnet") else {"critic": 12, "generator": 6}
    assert {player: result["turns"] for player, result in found.items()} == turns
    for player, result in found.items():
        assert result["names"], player
        assert result["from_hand"] <= 1e-6, player
        assert result["from_live"] > 1e-5, player


def test_ema_of_one_turn_is_nine_tenths_live(tiny_data: Path, tmp_path: Path) -> None:
    """The first decay is 1 / 10, and `players` names whose weights are averaged."""
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    recipe = recipe.set("callbacks.ema", {"decay": 0.999, "players": ["critic"]})
    recipe = recipe.set("callbacks.weights", {"name": "engine_cases:Weights"})
    with cases.trainer_of(recipe, World(), tmp_path / "run") as trainer:
        trainer.train(until=1)
        averages = trainer.callback("ema").weights(trainer)
        before, after = trainer.callback("weights").after["critic"]
    assert set(averages) == {"critic"}
    for name, live in after.items():
        expected = 0.1 * before[name].double() + 0.9 * live.double()
        assert torch.allclose(averages["critic"][name].double(), expected, rtol=0, atol=1e-7)


def test_ema_where_a_rank_holds_nothing(tiny_data: Path, tmp_path: Path) -> None:
    recipe = short(tiny_data).set("model", {"name": "engine_cases:OneRow"})
    train(recipe, run_dir=tmp_path / "one")
    sharded = [recipe.set("strategy", "fsdp2").as_dict(), str(tmp_path / "two"), None]
    spawn_ranks(2, cases.train_cases, [sharded], timeout=240)
    one, two = (
        checkpoint.Reader(checkpoint.resolve(path)).whole("callbacks/ema/model.row.weight")
        for path in (tmp_path / "one", tmp_path / "two")
    )
    torch.testing.assert_close(two, one)


def test_ema_ticks_by_turns_where_a_step_has_several(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    recipe = recipe.set("callbacks.ema", {"decay": 0.999, "players": ["critic"]})
    recipe = recipe.set("callbacks.weights", {"name": "engine_cases:Weights"})
    players = ("critic", "critic", "generator")
    with cases.trainer_of(recipe, World(), tmp_path / "run") as trainer:
        trainer.objective.turns = lambda step: [Turn(p, i) for i, p in enumerate(players)]
        trainer.train(until=2)
        average = trainer.callback("ema").weights(trainer)["critic"]
        first, *after = trainer.callback("weights").after["critic"]
        assert trainer.callback("ema").turns == {"critic": len(after)} == {"critic": 4}
    for name, weight in first.items():
        expected = weight.double()
        for turn, live in enumerate(after):
            expected.lerp_(live[name].double(), 1 - (1 + turn) / (10 + turn))
        assert torch.allclose(average[name].double(), expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("decay", (-0.1, 1.0, 1.5, math.nan))
def test_ema_refuses(decay: float) -> None:
    with pytest.raises(UserError, match=r"decay must be in \[0, 1\)"):
        ExponentialMovingAverage(decay)


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping


def tensors(run_dir: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    reader = checkpoint.open_whole(checkpoint.at(run_dir / "checkpoints", step))
    return {name: reader.whole(name) for name in reader.names(prefix)}


@pytest.mark.parametrize("count", (1, 2))
def test_early_stopping_rewinds_to_the_best(
    ranks: dict[int, dict[str, Any]], tiny_data: Path, count: int
) -> None:
    """F8. Evaluations 0.5, 0.3, 0.4, 0.35 at steps 2, 4, 6, 8: it ends at step 8 with everything as at step 4."""
    result, run_dir = ranks[count]["stopped"], ranks[1]["folder"] / f"stopped-{count}"
    assert result["steps"] == 8
    assert result["best"] == {"step": 4, "value": 0.3, "metric": "engine_cases:Planned"}
    assert "has not improved for 2 evaluations: back to step 4" in result["stopped"]
    for prefix in ("weights/", "optimizer/", "buffers/", "callbacks/"):
        best, last, before = (tensors(run_dir, step, prefix) for step in (4, 8, 6))
        assert best.keys() == last.keys()
        assert best
        assert all(torch.equal(best[name], last[name]) for name in best), prefix
        assert not all(torch.equal(best[name], before[name]) for name in best), prefix


def test_a_stopped_run_stays_stopped(ranks: dict[int, dict[str, Any]], tiny_data: Path) -> None:
    recipe = engine_cases.stopping_recipe(str(tiny_data))
    run_dir = ranks[1]["folder"] / "stopped-1"
    before = checkpoint.weights_digest(run_dir)
    result = train(recipe, run_dir=run_dir, resume="auto")
    assert (result["steps"], result["stopped"]) == (8, ranks[1]["stopped"]["stopped"])
    assert checkpoint.weights_digest(run_dir) == before


def test_early_stopping_where_nothing_ever_was_best(tiny_data: Path, tmp_path: Path) -> None:
    """A metric that is nan from the start: the run ends and says why; there is nothing to go back to."""
    recipe = engine_cases.stopping_recipe(str(tiny_data), "Never")
    result = train(recipe, run_dir=tmp_path / "run")
    assert result["steps"] == 4
    assert "engine_cases:Never" in result["stopped"]
    assert result["best"] == {}


def test_early_stopping_needs_evaluate_and_checkpoint(tiny_data: Path) -> None:
    whole = engine_cases.stopping_recipe(str(tiny_data))
    for without, message in (("evaluate", "evaluate.best"), ("callbacks.checkpoint", "checkpoint")):
        with pytest.raises(UserError, match=f"early_stopping: needs .*{message}"):
            whole.set(without, None).check_components()
    with pytest.raises(UserError, match="patience must be at least 1, got 0"):
        EarlyStopping(0)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints are kept


def kept(data: Path, run_dir: Path, **settings: Any) -> list[int]:
    recipe = engine_cases.stopping_recipe(str(data), duration="10 steps")
    recipe = recipe.set("callbacks.early_stopping", None).set("callbacks.checkpoint", settings)
    train(recipe, run_dir=run_dir)
    assert all(not found for found in checkpoint.check(run_dir).values())
    return checkpoint.steps(run_dir / "checkpoints")


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"every": "1 step", "keep": 1}, [10]),  # the best is the last: 0.1
        ({"every": "1 step", "keep": 3}, [8, 9, 10]),
        ({"every": "3 steps", "keep": 9}, [2, 3, 4, 6, 9, 10]),  # each new best, and the end
        ({"every": None, "keep": 1}, [10]),
    ],
)
def test_checkpoints_kept(
    tiny_data: Path, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    assert kept(tiny_data, tmp_path / "run", **settings) == steps


def test_the_best_is_never_deleted(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cases.Planned, "values", (0.5, 0.3, 0.4, 0.35, 0.9))
    assert kept(tiny_data, tmp_path / "run", every="1 step", keep=1) == [4, 10]


def test_a_damaged_one_displaces_none(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from before a damaged checkpoint keeps what it saves on its way there."""
    monkeypatch.setattr(engine_cases.Planned, "values", (0.5, 0.3, 0.4, 0.35, 0.9))
    run_dir, settings = tmp_path / "run", {"every": "1 step", "keep": 1}
    assert kept(tiny_data, run_dir, **settings) == [4, 10]
    (checkpoint.at(run_dir / "checkpoints", 10) / "index.json").unlink()
    train(run_dir, run_dir=run_dir, resume="auto", until=6)
    assert checkpoint.steps(run_dir / "checkpoints") == [4, 6, 10]
    assert not checkpoint.problems(checkpoint.at(run_dir / "checkpoints", 6))


def test_checkpoint_refuses_to_keep_none() -> None:
    with pytest.raises(UserError, match="keep must be at least 1, got 0"):
        CheckpointCallback(keep=0)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping and rates


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"norm": 1.0, "value": 1.0},
        {"norm": 0},
        {"norm": -1.0},
        {"value": math.inf},
        {"value": math.nan},
        {"norm": "1"},
    ],
)
def test_clip_gradients_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="clip_gradients: "):
        ClipGradients(**arguments)


TOTAL, WARMUP = 8, 2
T = TOTAL - WARMUP
SCHEDULES: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    ({"name": "constant"}, lambda s: 1.0),
    ({"name": "step", "every": "3 steps", "factor": 0.5}, lambda s: 0.5 ** (s // 3)),
    (
        {"name": "multi_step", "milestones": ["3 steps", "6 steps"], "factor": 0.1},
        lambda s: {0: 1.0, 1: 0.1, 2: 0.01}[(s >= 3) + (s >= 6)],
    ),
    ({"name": "exponential", "gamma": 0.9}, lambda s: 0.9 ** max(0, s - WARMUP)),
    ({"name": "exponential", "end": 0.01}, lambda s: 0.01 ** (max(0, s - WARMUP) / T)),
    ({"name": "linear", "end": 0.1}, lambda s: 1 - 0.9 * max(0, s - WARMUP) / T),
    ({"name": "cosine"}, lambda s: (1 + math.cos(math.pi * max(0, s - WARMUP) / T)) / 2),
    ({"name": "inverse_sqrt"}, lambda s: math.sqrt(WARMUP / max(s, WARMUP))),
]


@pytest.mark.parametrize(
    ("schedule", "closed"), SCHEDULES, ids=[str(list(s.values())) for s, _ in SCHEDULES]
)
def test_logged_rates_follow_the_schedule(
    tiny_data: Path, tmp_path: Path, schedule: dict[str, Any], closed: Callable[[int], float]
) -> None:
    """The row of step s + 1 shows the rate that step s was taken with."""
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single")
    recipe = recipe.set(
        "callbacks.learning_rate_decay", {"schedule": schedule, "warmup": f"{WARMUP} steps"}
    )
    run_dir = tiny_run(recipe, tmp_path / "run", steps=TOTAL)
    rows = cases.RunDirectory(run_dir).rows()
    assert [row["step"] for row in rows] == list(range(1, TOTAL + 1))
    base = recipe.optimizer["learning_rate"]
    for step, row in enumerate(rows):
        ramp = min(1.0, (step + 1) / (WARMUP + 1))
        assert row["learning_rate"] == pytest.approx(base * ramp * closed(step), rel=1e-12), step


def test_a_schedule_of_one_player(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy="single")
    recipe = recipe.set(
        "callbacks.learning_rate_decay", {"schedule": "linear", "players": ["critic"]}
    )
    rows = cases.RunDirectory(tiny_run(recipe, tmp_path / "run", steps=4)).rows()
    expected = [pytest.approx(1e-4 * (1 - s / 4), rel=1e-12) for s in range(4)]
    assert [row["critic/learning_rate"] for row in rows] == expected
    assert [row["generator/learning_rate"] for row in rows] == [1e-4] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Ways to start and to go on


def short(data: Path, **settings: Any) -> cases.Recipe:
    made = cases.tiny_recipe("resnet", data, strategy="single", duration="6 steps", **settings)
    return made.set("callbacks.dead_units", {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", 0.02),
        ("seed", 8),
        ("data.global_batch", 48),
        ("data.micro_batch", 12),
        ("duration", "7 steps"),
        ("precision", "bf16"),
        ("callbacks.ema.decay", 0.8),
        ("callbacks.clip_gradients", None),
        ("callbacks.dead_units", None),
        ("callbacks.console", {}),
        ("model.width", 8),
    ],
)
def test_a_changed_recipe_is_refused(tiny_data: Path, half: Path, key: str, value: Any) -> None:
    before = (half / "recipe.yaml").read_bytes(), checkpoint.weights_digest(half)
    with pytest.raises(UserError) as caught:
        train(short(tiny_data).set(key, value), run_dir=half, resume="auto")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(key) and "was begun with" in message
    after = (half / "recipe.yaml").read_bytes(), checkpoint.weights_digest(half)
    assert after == before


@pytest.fixture(scope="module")
def half(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended after 3 of its 6 steps."""
    path = tmp_path_factory.mktemp("half") / "run"
    assert train(short(tiny_data), run_dir=path, until=3)["steps"] == 3
    return path


def test_what_only_spreads_a_run_may_change(tiny_data: Path, half: Path, tmp_path: Path) -> None:
    """Strategy and loader workers; and the run is the one that never ended."""
    whole = tmp_path / "whole"
    train(short(tiny_data), run_dir=whole)
    spread = short(tiny_data).set("strategy", "ddp").set("data.workers", 1)
    assert train(spread, run_dir=half, resume=half)["steps"] == 6
    assert_same_run(whole, half)


def test_the_console_says_how_a_run_ended(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = short(tiny_data).set("callbacks.console", {})
    for until, end in ((3, "paused  step 3"), (None, "done  step 6")):
        train(recipe, run_dir=tmp_path / "run", resume="auto", until=until)
        assert capfd.readouterr().err.splitlines()[-1].startswith(end)


def test_resume_auto_starts_afresh_where_there_is_nothing(tiny_data: Path, tmp_path: Path) -> None:
    train(short(tiny_data), run_dir=tmp_path / "plain")
    result = train(short(tiny_data), run_dir=tmp_path / "auto", resume="auto")
    assert result["steps"] == 6
    assert_same_run(tmp_path / "plain", tmp_path / "auto")
    # and where a run fell before its first checkpoint
    fallen = short(tiny_data).set("callbacks.checkpoint", {"every": "4 steps"})
    train(fallen, run_dir=tmp_path / "fallen", until=2)
    for step in checkpoint.steps(tmp_path / "fallen" / "checkpoints"):
        path = checkpoint.at(tmp_path / "fallen" / "checkpoints", step)
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    train(fallen, run_dir=tmp_path / "fallen", resume="auto")
    assert_same_run(tmp_path / "plain", tmp_path / "fallen")
    rows = [row["step"] for row in cases.RunDirectory(tmp_path / "fallen").rows()]
    assert rows == [row["step"] for row in cases.RunDirectory(tmp_path / "plain").rows()]


def test_samples_are_drawn_on_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("wgan_gp", tiny_data, strategy="zero3", duration="4 steps")
    recipe = recipe.set("objective.name", "engine_cases:DrawnByRank0")
    recipe = recipe.set("callbacks.samples", {"every": "3 steps", "count": 4, "weights": "ema"})
    run_dir = tmp_path / "run"
    spawn_ranks(2, cases.train_cases, [[recipe.as_dict(), str(run_dir), None]], timeout=240)
    for row in cases.RunDirectory(run_dir).rows():
        assert (run_dir / row["images"]["generator"]).is_file()


def test_weights_are_those_of_an_average(tiny_data: Path, tmp_path: Path) -> None:
    recipe = short(tiny_data).set("callbacks.samples", {"weights": "checkpoint"})
    recipe = recipe.set("callbacks.throughput", {})  # which is told of a failure before it began
    with pytest.raises(UserError, match=r"samples\.weights: got 'checkpoint', expected 'live' or"):
        train(recipe, run_dir=tmp_path / "run")


def test_resume_by_path_needs_a_run(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        train(short(tiny_data), resume=tmp_path / "nothing")
    with pytest.raises(UserError, match="--resume auto: needs --run-dir"):
        train(short(tiny_data), resume="auto")
    assert not (tmp_path / "nothing").exists()


def test_a_directory_that_cannot_be_made_is_named(tiny_data: Path) -> None:
    with pytest.raises(UserError, match="--run-dir: /proc/run: No such file or directory"):
        train(short(tiny_data), run_dir="/proc/run")


def test_a_directory_is_not_trained_in_twice(tiny_data: Path, half: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        train(short(tiny_data), run_dir=half)


@pytest.mark.parametrize("model", cases.MODELS)
def test_quick_is_two_steps_with_a_resume_between(
    tiny_data: Path, tmp_path: Path, model: str
) -> None:
    recipe = cases.tiny_recipe(model, tiny_data, strategy="single")
    if model != "wgan_gp":
        metrics = {"split": "test", "every": "1 epoch", "metrics": ["loss"]}
        recipe = recipe.set("evaluate", metrics)
    result = train(recipe, run_dir=tmp_path / "quick", quick=True)
    assert result["steps"] == 2
    assert ("evaluate/loss" in result["results"]) == (model != "wgan_gp")
    train(recipe, run_dir=tmp_path / "plain", until=2)
    assert_same_run(tmp_path / "plain", tmp_path / "quick")
    rows = [row["step"] for row in cases.RunDirectory(tmp_path / "quick").rows()]
    assert rows == sorted(set(rows))
    assert rows[-1] == 2


def test_overfit_learns_its_batches_by_heart(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single", duration="40 steps")
    recipe = recipe.set("optimizer.learning_rate", 0.1).set("log.every", "1 step")
    recipe = recipe.set("data.transforms", {"train": []})
    recipe = recipe.set("callbacks", {"trace": {"name": "dist_train.testing:Trace"}})
    train(recipe, run_dir=tmp_path / "one", overfit=1)
    losses = [row["loss"] for row in cases.RunDirectory(tmp_path / "one").rows()]
    assert losses[-1] < 0.1 * losses[0]
    ids = sample_ids(read_trace(tmp_path / "one"))
    assert all(step == ids[1] for step in ids.values())
    train(recipe, run_dir=tmp_path / "two", overfit=2, until=5)
    ids = sample_ids(read_trace(tmp_path / "two"))
    assert ids[1] == ids[3] == ids[5] != ids[2] == ids[4]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that are not finite


def test_a_run_that_diverges_ends_and_never_saves_it(tiny_data: Path, tmp_path: Path) -> None:
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="single").set(
        "optimizer.learning_rate", 1e30
    )
    recipe = recipe.set("callbacks", {"checkpoint": {"every": "1 step", "keep": 20}})
    with pytest.raises(
        RuntimeError,
        match="step 3: the gradients of 'model' are not finite; there is no checkpoint yet",
    ):
        train(
            recipe.set("log.every", "3 steps").set("callbacks.checkpoint.every", "9 steps"),
            run_dir=tmp_path / "a",
        )
    with pytest.raises(RuntimeError, match="are not finite; go back to the checkpoint of step 1"):
        train(recipe.set("log.every", "9 steps"), run_dir=tmp_path / "b")
    assert checkpoint.steps(tmp_path / "b" / "checkpoints") == [1]
