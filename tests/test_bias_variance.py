"""F10: bias and variance that are known are measured to 10 %."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.data_shards.write import write_shards
from dist_train.diagnose.bias_variance import advice, decompose, measure
from dist_train.errors import UserError
from dist_train.recipe import Recipe

FEATURES, TRAINED, JUDGED = 20, 1600, 500
"""Of least squares on a bootstrap sample the variance is larger by about FEATURES / TRAINED: here 1 %."""


def bend(x: np.ndarray) -> np.ndarray:
    """Of mean 0 and variance 1, and uncorrelated with every feature: no linear model sees it. (N, F) -> (N,)."""
    return (x[:, 0] ** 2 - 1) / np.sqrt(2)


def pack(folder: Path, bent: float) -> tuple[np.ndarray, np.ndarray]:
    """A linear function plus `bent` times the bend; training targets have noise of variance 1. Returns both inputs."""
    rng = np.random.default_rng(0)
    slope = rng.standard_normal(FEATURES) / np.sqrt(FEATURES)
    inputs = {
        "train": rng.standard_normal((TRAINED, FEATURES)),
        "test": rng.standard_normal((JUDGED, FEATURES)),
    }

    def samples() -> Iterator[Any]:
        for split, x in inputs.items():
            y = x @ slope + bent * bend(x)
            if split == "train":
                y = y + rng.standard_normal(len(x))
            for i, (one, target) in enumerate(zip(x, y, strict=True)):
                fields = {"features.npy": np.float32(one), "target.npy": np.float32([target])}
                yield split, f"{split}-{i:04d}", fields

    write_shards(folder, "known", samples(), shard_size=500)
    return inputs["train"], inputs["test"]


def linear_model(data: Path) -> Recipe:
    """Gradient descent on the whole training set, long enough to reach the least squares solution."""
    return Recipe(
        duration="12 steps",
        data={"path": str(data), "global_batch": TRAINED, "micro_batch": TRAINED},
        model={"name": "mlp", "depth": 0, "in_features": "auto", "num_outputs": 1},
        objective={"name": "regression"},
        optimizer={"name": "sgd", "learning_rate": 0.45},
        evaluate={"split": "test", "every": "12 steps", "metrics": ["rmse"], "micro_batch": 250},
        log={"every": "12 steps"},
    )


def test_variance_of_least_squares(tmp_path: Path) -> None:
    """A model that can express the truth has no bias, and the variance sigma^2 x' (X'X)^-1 x of the textbook."""
    train, test = pack(tmp_path / "data", bent=0.0)
    found = measure(
        linear_model(tmp_path / "data"), resamples=40, parallel=2, run_dir=tmp_path / "run"
    )
    train, test = (np.hstack([x, np.ones((len(x), 1))]) for x in (train, test))
    expected = np.einsum("ni,ij,nj->n", test, np.linalg.inv(train.T @ train), test).mean()
    assert found["variance"] == pytest.approx(expected, rel=0.1)
    assert found["error"] == pytest.approx(found["bias2"] + found["variance"])


def test_bias_of_a_model_that_cannot_bend(tmp_path: Path) -> None:
    _, test = pack(tmp_path / "data", bent=3.0)
    found = measure(
        linear_model(tmp_path / "data"), resamples=10, parallel=2, run_dir=tmp_path / "run"
    )
    assert found["bias2"] == pytest.approx(9.0 * np.square(bend(test)).mean(), rel=0.1)
    assert found["advice"].startswith("bias")


def test_decomposition_is_free_of_the_bias_of_few_members() -> None:
    """Predictions of variance 0.5 about a mean that is off by 2: on average the parts come out right even of 3."""
    torch.manual_seed(0)
    target = torch.zeros(4000, 1)
    parts = decompose(2 + 0.5**0.5 * torch.randn(3, 4000, 1), target)
    assert parts["variance"] == pytest.approx(0.5, rel=0.05)
    assert parts["bias2"] == pytest.approx(4.0, rel=0.05)
    predictions = torch.randn(5, 30, 3)
    errors = (predictions - 1).double().square().sum(-1).mean()
    assert decompose(predictions, torch.ones(30, 3))["error"] == pytest.approx(float(errors))
    assert advice({"bias2": 1.0, "variance": 2.0}).startswith("variance")


def test_classes_are_judged_by_their_probabilities(tiny_data: Path, tmp_path: Path) -> None:
    recipe = linear_model(tiny_data / "digits").set("data.micro_batch", 40)
    recipe = recipe.set("data.global_batch", 40).set("model.num_outputs", "auto")
    recipe = recipe.set("objective.name", "classification")
    recipe = recipe.set("evaluate.metrics", ["accuracy"])
    found = measure(recipe, resamples=3, run_dir=tmp_path / "run")
    assert 0 < found["variance"] < found["error"] < 1


def test_mistakes_are_named(tiny_data: Path) -> None:
    recipe = linear_model(tiny_data / "digits").set("evaluate", None)
    with pytest.raises(UserError, match="no evaluate section"):
        measure(recipe)
    with pytest.raises(UserError, match="variance needs 2 or more, got 1"):
        decompose(torch.zeros(1, 2, 1), torch.zeros(2, 1))
