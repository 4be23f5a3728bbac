"""Each thing that can be wrong with a run is injected, and named; a run that is well is left alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.diagnose.curves import CHECKS, diagnose
from dist_train.recipe import Recipe
from dist_train.report import RunRecord, verdict
from dist_train.run_directory import RunDirectory
from dist_train.testing import tiny_run

Figure = Callable[[float], float]


def rows(noise: float = 0.01, **figures: Figure) -> list[dict[str, Any]]:
    """100 rows over t from 0 to 1; a figure that is not finite as the journal writes it; evaluations each 20 steps."""
    draw = random.Random(0)
    made = []
    for i in range(100):
        row: dict[str, Any] = {"step": 10 * (i + 1), "learning_rate": 0.1, "gradient_norm": 1.0}
        for name, figure in figures.items():
            value = figure(i / 99) * (1 + noise * draw.gauss(0, 1))
            name = name.replace("__", "/")
            if name.startswith("evaluate/") and i % 20 != 19:
                continue
            row |= (
                {name: value}
                if math.isfinite(value)
                else {name: None, f"{name}/nonfinite": str(value)}
            )
        made.append(row)
    return made


def falling(t: float) -> float:
    return 0.2 + 2.0 * math.exp(-5 * t)


def decaying(t: float) -> float:
    return 0.1 * (1 + math.cos(math.pi * t)) / 2


HEALTHY = {
    "loss": falling,
    "evaluate__loss": lambda t: falling(t) + 0.05,
    "learning_rate": decaying,
}
INJECTED: dict[str, dict[str, Figure]] = {
    "over-fitting": {"evaluate__loss": lambda t: 0.5 + 2 * (t - 0.4) ** 2},
    "under-fitting": {
        "loss": lambda t: 2.0 + 0.3 * math.exp(-9 * t),
        "evaluate__loss": lambda t: 2.0 + 0.3 * math.exp(-9 * t),
    },
    "rate too high": {"loss": lambda t: 2.3 + 5 * t},
    "rate too low": {"loss": lambda t: 2.3 - 0.3 * t, "evaluate__loss": lambda t: 2.3 - 0.3 * t},
    "plateau": {"loss": lambda t: max(0.8, 2.3 - 6 * t), "learning_rate": lambda t: 0.1},
    "exploding gradients": {"gradient_norm": lambda t: 500.0 if 0.5 < t < 0.52 else 1.0},
    "dead units": {"dead_units": lambda t: 0.5 * t},
    "KL too low": {"kl": lambda t: 20 * math.exp(-9 * t), "prior_gap": lambda t: 0.01},
    "KL too high": {"kl": lambda t: 40 + 20 * t, "prior_gap": lambda t: 3 * t},
}


def names(made: list[dict[str, Any]]) -> list[str]:
    return [finding.name for finding in diagnose(made)]


def test_a_healthy_run_is_left_alone() -> None:
    assert names(rows(**HEALTHY)) == []
    learnt: dict[str, Figure] = {
        "loss": lambda t: 0.001 + 2.3 * math.exp(-30 * t),
        "learning_rate": lambda t: 0.1,
    }
    assert names(rows(**learnt)) == []  # it stands still because nothing is left to learn
    assert diagnose([]) == []
    assert names([{"step": 1, "loss": 2.0}]) == []


@pytest.mark.parametrize("name", INJECTED)
def test_what_is_injected_is_named(name: str) -> None:
    assert names(rows(**(HEALTHY | INJECTED[name]))) == [name]


def test_every_check_is_injected() -> None:
    assert len(INJECTED) == len(CHECKS)


@pytest.mark.parametrize(
    ("figures", "name", "says"),
    [
        ({"loss": lambda t: 1.0 if t < 0.5 else math.nan}, "rate too high", "was nan at step 510"),
        ({"loss": lambda t: 1.0 + 0.9 * math.sin(1e4 * t)}, "rate too high", "jumps by"),
        (
            {"gradient_norm": lambda t: 1.0 if t < 0.9 else math.inf},
            "exploding gradients",
            "was inf",
        ),
        ({"gradient_norm": lambda t: 1e4 ** (t**8)}, "exploding gradients", "its median"),
        (
            {"loss": lambda t: 0.02 + 2 * math.exp(-9 * t), "evaluate__loss": lambda t: 0.4},
            "over-fitting",
            "times",
        ),
    ],
)
def test_its_other_faces(figures: dict[str, Figure], name: str, says: str) -> None:
    found = {finding.name: finding.text for finding in diagnose(rows(**(HEALTHY | figures)))}
    assert says in found[name]


def test_players_against_each_other_are_judged_by_their_gradients_alone() -> None:
    made = rows(critic__loss=lambda t: 5 * t, critic__gradient_norm=lambda t: 1e4 ** (t**8))
    assert names(made) == ["exploding gradients"]
    assert "critic/gradient norm" in diagnose(made)[0].text


def test_the_report_gives_the_remedy(tmp_path: Path) -> None:
    directory = RunDirectory.create_at(tmp_path / "run")
    directory.write_recipe("name: x\n")
    for row in rows(**(HEALTHY | INJECTED["plateau"])):
        directory.append_row(row)
    said = " ".join(verdict(RunRecord.read(directory.path)))
    assert "A plateau: the loss has stood at 0." in said
    assert "Decay the learning rate" in said


def test_units_that_died_are_counted(tiny_data: Path, tmp_path: Path) -> None:
    """A hidden layer whose biases are far below 0 passes nothing on; with good ones nothing is dead."""
    found = {}
    for name in ("alive", "half_dead"):
        recipe = Recipe(
            duration="4 steps",
            data={"path": str(tiny_data / "digits"), "global_batch": 24, "micro_batch": 12},
            model={"name": f"cases:{name}"},
            objective={"name": "classification"},
            optimizer={"name": "sgd", "learning_rate": 1e-3},
            callbacks={"dead_units": {"every": "2 steps"}},
        )
        rows = RunDirectory.open(tiny_run(recipe, tmp_path / name)).rows()
        found[name] = [row["dead_units"] for row in rows if "dead_units" in row]
    assert len(found["alive"]) == len(found["half_dead"]) >= 1
    assert max(found["alive"]) < 0.2
    assert found["half_dead"][-1] == 0.5
