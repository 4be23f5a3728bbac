"""A signal to any rank, at any moment: all stop at one place, nothing is lost, the run goes on as if nothing was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import rank_cases
from slurm_cluster import processes_of, wait_for

from dist_train import checkpoint
from dist_train.errors import Interrupted
from dist_train.run import train
from dist_train.run_directory import RunDirectory
from dist_train.testing import RankFailed, assert_same_run, spawn_ranks

STEPS = 24
TERM, USR2, INT = int(signal.SIGTERM), int(signal.SIGUSR2), int(signal.SIGINT)
EACH = -1
PLANS: dict[str, list[tuple[int, str, int, int]]] = {
    "unbroken": [],
    "before the first step": [(TERM, "run_begins", 0, 1)],
    "in a step": [(USR2, "gradients_ready", 4, 0)],
    "between two steps": [(TERM, "step_ends", 5, 1)],
    "in evaluation": [(TERM, "evaluation_batch", 5, 0)],
    "in the last step": [(TERM, "gradients_ready", STEPS - 1, 0)],
    "in the last evaluation": [(TERM, "evaluation_batch", STEPS, 0)],
    "Ctrl-C": [(INT, "gradients_ready", 7, 1)],
    "ten times": [(TERM, "step_ends", -1, number % 2) for number in range(10)],
    # of both ranks at once: the place where they stop does not depend on who is ahead
    "both in accumulation": [(TERM, "step_begins", 4, EACH), (TERM, "step_begins", 9, EACH)],
    "both in evaluation": [(TERM, "evaluation_batch", 5, EACH)] * 2
    + [(TERM, "evaluation_batch", STEPS, EACH)],
    "mirrored": [(TERM, "evaluation_batch", 10, EACH), (USR2, "step_ends", 16, 1)],
    "GAN, unbroken": [],
    "GAN, both in sampling": [(TERM, "step_ends", 10, EACH), (TERM, "step_ends", 20, EACH)],
}


@pytest.fixture(scope="module")
def runs(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Any]]]:
    """Every plan on two ranks, under ZeRO-2 with evaluation; and how its starts ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    recipes = {}
    for model in ("resnet", "wgan_gp"):
        recipe = cases.tiny_recipe(model, tiny_data, strategy="zero2", duration=f"{STEPS} steps")
        recipe = recipe.set("log.every", "1 step")
        recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
        recipes[model] = recipe.set("callbacks.signal", {"name": "rank_cases:Signal"})
    resnet = recipes["resnet"].set(
        "evaluate", {"split": "test", "every": "5 steps", "metrics": ["accuracy"]}
    )
    gan = recipes["wgan_gp"].set("callbacks.samples", {"every": "5 steps", "count": 4})
    mirrored = resnet.set("callbacks.wandb", {"mode": "offline"})
    plans = []
    for name, signals in PLANS.items():
        recipe = gan if "GAN" in name else mirrored if name == "mirrored" else resnet
        plans.append((recipe.as_dict(), str(folder / name), signals))
    ends = spawn_ranks(2, rank_cases.interrupted, plans, timeout=250)
    assert ends[0] == ends[1], "all ranks end alike"
    return folder, dict(zip(PLANS, ends[0], strict=True))


@pytest.mark.parametrize("name", [name for name in PLANS if "unbroken" not in name])
def test_the_run_goes_on_as_if_nothing_was(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, _ = runs
    unbroken = folder / ("GAN, unbroken" if "GAN" in name else "unbroken")
    assert_same_run(unbroken, folder / name)
    rows, expected = (RunDirectory(path).rows() for path in (folder / name, unbroken))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "one row a step"
    for row, before in zip(rows, expected, strict=True):
        assert set(row) == set(before)
        for key in before:
            if not any(word in key for word in ("second", "data_wait", "memory")):
                assert row[key] == before[key], f"step {row['step']}: {key}"


@pytest.mark.parametrize("name", [name for name in PLANS if "last" not in name])
def test_exit_codes_and_what_is_said(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    *interrupted, last = runs[1][name]
    assert last == [0, "", STEPS]
    for (code, message, _), (number, _, step, rank) in zip(interrupted, PLANS[name], strict=True):
        assert code == (130 if number == INT else 75)
        assert f"{signal.Signals(number).name} to rank {rank if rank != EACH else ''}" in message
        saved = int(message.partition("at step ")[2].split()[0])
        assert step == -1 or step <= saved <= step + 2, message


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("both in accumulation", [4, 9]),  # steps 5 and 10 have begun, and begin again
        ("both in evaluation", [5, 5, STEPS]),
        ("GAN, both in sampling", [10, 20]),
    ],
)
def test_what_takes_long_is_cut_short(
    runs: tuple[Path, dict[str, Any]], name: str, saved: list[int]
) -> None:
    """An evaluation that was not finished has no row yet: the next start evaluates again, and writes it."""
    *interrupted, _ = runs[1][name]
    steps = [int(message.partition("at step ")[2].split()[0]) for _, message, _ in interrupted]
    assert steps == saved
    rows = [row for _, _, row in interrupted]
    assert rows == (saved if "accumulation" in name else [step - 1 for step in saved])


def test_one_tracker_run_with_a_row_a_step(runs: tuple[Path, dict[str, Any]]) -> None:
    from dist_train.callbacks.wandb import history, stored_files

    directory = RunDirectory(runs[0] / "mirrored")
    assert len(stored_files(directory)) == 3, "a file a start, all of the one run"
    assert len(list(directory.path.rglob("*.wandb"))) == 3
    mirrored = history(directory.path / "wandb")
    assert [row["step"] for row in mirrored] == list(range(1, STEPS + 1))
    for row, own in zip(mirrored, directory.rows(), strict=True):
        assert {key: row.get(key) for key in own if "evaluate" in key} == {
            key: own[key] for key in own if "evaluate" in key
        }
    assert "evaluate/accuracy" in mirrored[9], "the one that was cut short"


def test_nothing_is_saved_before_the_first_step(runs: tuple[Path, dict[str, Any]]) -> None:
    assert 0 not in checkpoint.steps(runs[0] / "before the first step" / "checkpoints")


# ---------------------------------------------------------------------------------------------------------------------
# Killed, or told again, while it saves


SAVES = {  # the second save of a run is that of the interruption, at step 8; the first was at step 6
    "kill@save:1:1": 6,
    "kill@save-written:0:1": 6,
    "kill@save-publish:0:1": 6,
    "kill@saved:1:1": 8,
    "term@save-written:1:1": 8,
    "usr2@save:0:1": 8,
    "kill@save-aside:0:0": 8,  # by the next start, which evaluates after step 8, and saves that step again
}


@pytest.fixture(scope="module")
def saves(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unbroken run, and one for each of SAVES as the fault has left it."""
    folder = tmp_path_factory.mktemp("saves")
    recipe = cases.tiny_recipe("resnet", tiny_data, duration="12 steps").set("log.every", "1 step")
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    section = {
        "split": "test",
        "every": "8 steps",
        "metrics": ["accuracy"],
        "best": "accuracy",
        "mode": "max",
    }
    recipe = recipe.set("evaluate", section)
    settings = recipe.set("callbacks.signal", {"name": "rank_cases:Signal"}).as_dict()
    told: tuple[int, str, int, int] | None = (TERM, "evaluation_batch", 8, EACH)
    for fault in SAVES:
        train = (2, rank_cases.faulty, settings, str(folder / fault))
        if "aside" in fault:
            with pytest.raises(Interrupted):
                spawn_ranks(*train, told, "", timeout=240)
            told = None
        with pytest.raises(RankFailed if "kill" in fault else Interrupted):
            spawn_ranks(*train, told, fault, timeout=240)
        shutil.copytree(folder / fault, folder / f"{fault}, left")
    unbroken = (settings, str(folder / "unbroken"), [])
    again = [(settings, str(folder / fault), []) for fault in SAVES]
    spawn_ranks(2, rank_cases.interrupted, [unbroken, *again], timeout=240)
    return folder


@pytest.mark.parametrize("fault", SAVES)
def test_a_save_is_whole_or_not_there(saves: Path, fault: str) -> None:
    left = saves / f"{fault}, left" / "checkpoints"
    checkpoint.put_back(left)
    path, skipped = checkpoint.last_good(left)
    assert path == checkpoint.at(left, SAVES[fault]) and not skipped
    assert_same_run(saves / "unbroken", saves / fault)
    rows = [row["step"] for row in RunDirectory(saves / fault).rows()]
    assert rows == list(range(1, 13)), "one row a step"


def test_a_grace_that_is_too_short_for_the_save(saves: Path, tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL to the launcher while rank 0 still writes: the checkpoint before it is what counts."""
    run_dir = tmp_path / "run"
    words = [str(saves / "unbroken" / "recipe.yaml"), "--set", "callbacks.signal=null"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "train", *words, "--run-dir", run_dir, "--ranks", "2"],
        env=os.environ | {"DIST_TRAIN_FAULT": "stop@save-publish:0:1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        half = run_dir / "checkpoints" / ".writing-00000008" / "manifest.json"
        wait_for(half.exists, "the second save")
        launcher.send_signal(signal.SIGTERM)
    finally:
        launcher.kill()
        launcher.wait()
    found = checkpoint.last_good(run_dir / "checkpoints")
    assert found == (checkpoint.at(run_dir / "checkpoints", 6), [])
    wait_for(lambda: processes_of(run_dir) == [], "the end of the ranks", 30)
    train(run_dir, run_dir=run_dir, resume="auto", ranks=2)
    assert_same_run(saves / "unbroken", run_dir)
