"""Scalars on schedules: values, resume, ranks, and the plateau, which alone has state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from dist_train.callbacks.learning_rate_decay import LearningRateDecay
from dist_train.errors import UserError
from dist_train.objectives.classification import Classification
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, tiny_run
from dist_train.world import pin_threads


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    pin_threads(1, 1)


class Scaled(Classification):
    """Classification times the scalar `beta`."""

    def loss(
        self, turn: Any, networks: Any, micro: Any, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = super().loss(turn, networks, micro, scalars)
        return loss * scalars["beta"], {
            "plain": loss.detach(),
            "scaled": loss.detach() * scalars["beta"],
        }


def recipe(data: Path, **callbacks: Any) -> Any:
    made = cases.tiny_recipe("resnet", data, strategy="single", log__every="1 step")
    made = made.set("callbacks.learning_rate_decay", None)
    for name, spec in callbacks.items():
        made = made.set(f"callbacks.{name}", spec)
    return made


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return RunDirectory(run_dir).rows()


def test_the_objective_sees_the_scalar_of_its_step(tiny_data: Path, tmp_path: Path) -> None:
    """Also after a resume in the middle, bit for bit."""
    beta = {"name": "schedule", "scalar": "beta", "schedule": "linear", "value": 4.0}
    scaled = recipe(tiny_data, beta=beta).set("objective", {"name": f"{__name__}:Scaled"})
    whole = tiny_run(scaled, tmp_path / "whole", steps=8)
    found = rows(whole)
    assert [row["beta"] for row in found] == [pytest.approx(4 - step / 2) for step in range(8)]
    assert [row["scaled"] / row["plain"] for row in found] == [
        pytest.approx(4 - step / 2, rel=1e-5) for step in range(8)
    ]
    tiny_run(scaled, tmp_path / "halves", steps=8, until=5)
    assert_same_run(whole, tiny_run(scaled, tmp_path / "halves", steps=8, resume="auto"))
    assert [row["beta"] for row in rows(tmp_path / "halves")] == [row["beta"] for row in found]


def test_a_rise_from_zero_is_a_warm_up(tiny_data: Path, tmp_path: Path) -> None:
    rise = {"name": "schedule", "scalar": "beta", "value": 2.0, "schedule": "constant"}
    run_dir = tiny_run(
        recipe(tiny_data, rise=rise | {"warmup": "4 steps"}), tmp_path / "run", steps=6
    )
    expected = [pytest.approx(2 * share) for share in (0.2, 0.4, 0.6, 0.8, 1, 1)]
    assert [row["beta"] for row in rows(run_dir)] == expected


def test_momentum_and_decay_of_the_optimizer(tiny_data: Path, tmp_path: Path) -> None:
    scheduled = recipe(
        tiny_data,
        momentum={"name": "schedule", "scalar": "momentum", "schedule": "linear"},
        decay={
            "name": "schedule",
            "scalar": "weight_decay",
            "schedule": {"name": "linear", "end": 3},
        },
    )
    found = rows(tiny_run(scheduled, tmp_path / "run", steps=4))
    assert [row["momentum"] for row in found] == [
        pytest.approx(0.9 * share) for share in (1, 0.75, 0.5, 0.25)
    ]
    assert [row["weight_decay"] for row in found] == [
        pytest.approx(5e-4 * factor) for factor in (1, 1.5, 2, 2.5)
    ]


def always_one(outputs: Any, micro: Any) -> tuple[float, float]:
    return float(micro.real), float(micro.real)


def test_plateau_cuts_after_evaluations_without_a_new_best(tiny_data: Path, tmp_path: Path) -> None:
    """The evaluation of step 2 is the best for ever: cuts come with those of steps 6, 10 and 14."""
    metric = f"{__name__}:always_one"
    evaluate = {
        "split": "test", "every": "2 steps", "metrics": [metric], "best": metric, "mode": "min",
    }  # fmt: skip
    plateau = {"schedule": {"name": "plateau", "factor": 0.5, "patience": 2, "end": 0.2}}
    cut = recipe(tiny_data, learning_rate_decay=plateau).set("evaluate", evaluate)
    whole = tiny_run(cut, tmp_path / "whole", steps=16)
    expected = [1.0] * 6 + [0.5] * 4 + [0.25] * 4 + [0.2] * 2
    assert [row["learning_rate"] for row in rows(whole)] == [
        pytest.approx(0.01 * factor) for factor in expected
    ]
    tiny_run(cut, tmp_path / "halves", steps=16, until=7)
    assert_same_run(whole, tiny_run(cut, tmp_path / "halves", steps=16, resume="auto"))


def test_plateau_begins_with_the_first_number(tiny_data: Path) -> None:
    """An evaluation that is not a number brings no new best, and hides none that follows."""
    plateau = {"schedule": {"name": "plateau", "patience": 2}}
    evaluate = {
        "split": "test",
        "every": "2 steps",
        "metrics": ["loss"],
        "best": "loss",
        "mode": "min",
    }
    made = recipe(tiny_data).set("evaluate", evaluate)
    callback = LearningRateDecay(**plateau)
    run: Any = SimpleNamespace(recipe=made, evaluation_counts=True)
    cuts = []
    for loss in (math.nan, 3.0, 2.0, math.nan, 1.0, 1.5, 1.2):
        callback.evaluated(run, {"loss": loss})
        cuts.append(callback.cuts)
    assert cuts == [0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"scalar": "beta"}, "value: got None, expected a number"),
        ({"scalar": "momentum", "value": 1.0}, "value: got 1.0, expected none"),
        ({"scalar": "learning_rate"}, "learning_rate_decay"),
        ({"scalar": "beta", "value": 1.0, "players": ["model"]}, "beta is no optimiser's"),
        ({"scalar": "beta", "value": 1.0, "schedule": "cosin"}, "did you mean 'cosine'"),
        ({"scalar": "beta", "value": 1.0, "schedule": "plateau"}, "plateau needs evaluate.best"),
        ({"scalar": "beta", "value": 1.0, "warmup": "3"}, "'3 steps'|number and a unit"),
        ({"scalar": "beta", "value": 1.0, "schedule": {"end": 0.1}}, "expected one with a name"),
    ],
)
def test_mistakes(tiny_data: Path, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_data, mine={"name": "schedule"} | spec).check_components()


def without_a_rate(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr)


def test_the_rate_of_an_optimizer_that_has_its_own(tiny_data: Path, tmp_path: Path) -> None:
    made = recipe(tiny_data, learning_rate_decay={"schedule": "linear"})
    made = made.set("optimizer", {"name": "adafactor"})
    found = rows(tiny_run(made, tmp_path / "run", steps=2))
    assert [row["learning_rate"] for row in found] == [0.01, 0.005]
    made = made.set("optimizer", {"name": f"{__name__}:without_a_rate", "lr": 0.1})
    with pytest.raises(UserError, match=r"optimizer '.*:without_a_rate' has no learning_rate"):
        made.check_components()


def test_an_optimizer_without_the_setting(tiny_data: Path) -> None:
    momentum = {"name": "schedule", "scalar": "momentum"}
    made = recipe(tiny_data, mine=momentum)
    made = made.set("optimizer", {"name": "adagrad", "learning_rate": 0.1})
    with pytest.raises(UserError, match="scalar: optimizer 'adagrad' has no momentum"):
        made.check_components()
    made.set("optimizer.name", "adam").check_components()
