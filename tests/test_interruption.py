"""A signal to any rank, at any moment: all stop at one step, nothing is lost, and the run goes on as if nothing was."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import cases
import pytest
import rank_cases

from dist_train import checkpoint
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, spawn_ranks

STEPS = 24
TERM, USR2, INT = int(signal.SIGTERM), int(signal.SIGUSR2), int(signal.SIGINT)
PLANS: dict[str, list[tuple[int, str, int, int]]] = {
    "unbroken": [],
    "before the first step": [(TERM, "run_begins", 0, 1)],
    "in accumulation": [(USR2, "gradients_ready", 4, 0)],
    "between two steps": [(TERM, "step_ends", 5, 1)],
    "in evaluation": [(TERM, "evaluation_batch", 5, 0)],
    "in the last step": [(TERM, "gradients_ready", STEPS - 1, 0)],
    "in the last evaluation": [(TERM, "step_ends", STEPS, 0)],
    "Ctrl-C": [(INT, "gradients_ready", 7, 1)],
    "ten times": [(TERM, "step_ends", -1, number % 2) for number in range(10)],
}


@pytest.fixture(scope="module")
def runs(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Any]]]:
    """Every plan on two ranks, under ZeRO-2 with evaluation; and how its starts ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    recipe = cases.tiny_recipe("resnet", tiny_data, strategy="zero2", duration=f"{STEPS} steps")
    recipe = recipe.set("log.every", "1 step").set(
        "evaluate", {"split": "test", "every": "5 steps", "metrics": ["accuracy"]}
    )
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    settings = recipe.set("callbacks.signal", {"name": "rank_cases:Signal"}).as_dict()
    plans = [(settings, str(folder / name), signals) for name, signals in PLANS.items()]
    ends = spawn_ranks(2, rank_cases.interrupted, plans, timeout=200)
    assert ends[0] == ends[1], "all ranks end alike"
    return folder, dict(zip(PLANS, ends[0], strict=True))


@pytest.mark.parametrize("name", [name for name in PLANS if name != "unbroken"])
def test_the_run_goes_on_as_if_nothing_was(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, _ = runs
    assert_same_run(folder / "unbroken", folder / name)
    rows = [row["step"] for row in RunDirectory(folder / name).rows()]
    assert rows == list(range(1, STEPS + 1)), "one row a step"
    keys = [set(row) for row in RunDirectory(folder / name).rows()]
    assert keys == [set(row) for row in RunDirectory(folder / "unbroken").rows()]


@pytest.mark.parametrize("name", [name for name in PLANS if "last" not in name])
def test_exit_codes_and_what_is_said(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    *interrupted, last = runs[1][name]
    assert last == [0, ""]
    for (code, message), (number, _, step, rank) in zip(interrupted, PLANS[name], strict=True):
        assert code == (130 if number == INT else 75)
        assert f"{signal.Signals(number).name} to rank {rank}" in message
        saved = int(message.partition("at step ")[2].split()[0])
        assert step == -1 or step <= saved <= step + 2, message


def test_a_run_that_is_through_is_done(runs: tuple[Path, dict[str, Any]]) -> None:
    assert runs[1]["in the last step"][0] == [0, ""]


def test_nothing_is_saved_before_the_first_step(runs: tuple[Path, dict[str, Any]]) -> None:
    assert 0 not in checkpoint.steps(runs[0] / "before the first step" / "checkpoints")
