"""F13: ranks and similarities against their formulas; a deep linear network learns its modes when theory says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch

from dist_train import checkpoint
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import pack
from dist_train.diagnose.representations import (
    cka,
    effective_rank,
    half_times,
    mode_strengths,
    mode_times,
    similarity,
)
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.testing import assert_same_run, tiny_run


def test_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([2.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(entropy))


def test_similarity_is_numpys_correlation() -> None:
    x = torch.randn(7, 12, dtype=torch.float64)
    np.testing.assert_allclose(similarity(x).numpy(), np.corrcoef(x.numpy()), atol=1e-12)
    assert (similarity(torch.ones(2, 5)) == 0).all()


def test_cka_is_its_formula() -> None:
    """Against HSIC with the centring matrix written out; 1 up to rotation and scale, 0 for uncorrelated features."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)
    centring = torch.eye(20, dtype=torch.float64) - 1 / 20

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.trace(a @ a.T @ centring @ b @ b.T @ centring)

    assert cka(x, y) == pytest.approx(float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    waves = torch.arange(20, dtype=torch.float64) * (2 * math.pi / 20)
    assert cka(waves.sin()[:, None], waves.cos()[:, None]) == pytest.approx(0, abs=1e-12)


def test_mode_times_solve_the_equation_of_a_mode() -> None:
    """T da/dt = 2 a (s - a), integrated in small steps until a is half of s."""
    for s in (0.5, 1.0, 3.0):
        a, t, dt = 0.01, 0.0, 1e-4
        while a < s / 2:
            a += dt * 2 * a * (s - a) / 10
            t += dt
        found = mode_times(torch.tensor([s], dtype=torch.float64), 0.01, 10)
        assert float(found) == pytest.approx(t, rel=1e-3)


def test_modes_are_learnt_in_order_at_the_predicted_times(tmp_path: Path) -> None:
    """The recipe of F13 on real digits: nine modes, each within 15 % of its time."""
    pack("digits-by-class", tmp_path / "data")
    recipe = Recipe.load("modes-digits")
    data = {"path": str(tmp_path / "data"), "global_batch": 256, "micro_batch": 128}
    run = tiny_run(recipe.set("data", data), tmp_path / "run", steps=250, evaluate=None)
    found = json.loads((run / "plots" / "singular-values-model.json").read_text())
    learnt = found["singular_values"]["product"]

    train = Shards(tmp_path / "data", "train")
    x, target = (
        torch.from_numpy(np.array(train.column(name, np.arange(len(train))))).double()
        for name in ("features", "target")
    )
    strengths = mode_strengths(x, target)[:9]
    end = torch.tensor(learnt[-1], dtype=torch.float64)
    torch.testing.assert_close(end, strengths, rtol=0.05, atol=0)
    rate, width, deviation = 1.0, 64, 0.01
    predicted = mode_times(strengths, width * deviation**2 / 2, target.shape[1] / (2 * rate))
    measured = half_times(found["steps"], learnt, strengths.tolist())
    print([f"{m / t:.3f}" for m, t in zip(measured, predicted.tolist(), strict=True)])
    assert measured == sorted(measured)
    for time, theory in zip(measured, predicted.tolist(), strict=True):
        assert time == pytest.approx(theory, rel=0.15)


def watched(data: Path, **settings: Any) -> Recipe:
    """The tiny ResNet with both callbacks."""
    recipe = cases.tiny_recipe("resnet", data, **settings)
    recipe = recipe.set("evaluate", {"split": "test", "every": "6 steps", "metrics": ["loss"]})
    for name in ("singular_values", "similarity"):
        recipe = recipe.set(f"callbacks.{name}", {"every": "3 steps"})
    return recipe


def plots_of(run: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in (run / "plots").glob("*.json")}


def test_callbacks_see_whole_weights_and_change_nothing(tiny_data: Path, tmp_path: Path) -> None:
    """Two ranks under ZeRO-3 see what one process sees; a resumed run has the whole history."""
    single = watched(tiny_data, strategy="single")
    bare = single.set("callbacks.singular_values", None).set("callbacks.similarity", None)
    plain = tiny_run(bare, tmp_path / "plain", steps=6)
    one = tiny_run(single, tmp_path / "one", steps=6)
    assert_same_run(plain, one)
    tiny_run(single, tmp_path / "halves", steps=6, until=3)
    tiny_run(single, tmp_path / "halves", steps=6, resume="auto")
    assert plots_of(tmp_path / "halves") == plots_of(one)
    sharded = watched(tiny_data, strategy=cases.strategy("zero3"))
    two = tiny_run(sharded, tmp_path / "two", steps=6, ranks=2)
    found, expected = plots_of(two), plots_of(one)
    assert list(found) and sorted(found) == sorted(expected)
    values, others = (
        plots["singular-values-model.json"]["singular_values"] for plots in (found, expected)
    )
    assert found["singular-values-model.json"]["steps"] == [0, 3, 6]
    for name, rows in others.items():
        np.testing.assert_allclose(values[name], rows, rtol=1e-4, atol=1e-6)
    last = checkpoint.Reader(checkpoint.resolve(one)).whole("weights/model.stem.0.weight")
    exact = torch.linalg.svdvals(last.flatten(1))
    np.testing.assert_allclose(others["model.stem.0"][-1], exact[:10].numpy(), rtol=1e-5)
    row = RunDirectory.open(one).rows()[-1]
    assert row["effective_rank/model.stem.0"] == pytest.approx(effective_rank(exact), rel=1e-5)
    likeness = np.array(expected["similarity-00000006.json"]["cka"])
    np.testing.assert_allclose(found["similarity-00000006.json"]["cka"], likeness, atol=1e-4)
    np.testing.assert_allclose(np.diag(likeness), 1, rtol=1e-9)
    for name in ("singular-values-model.png", "similarity-00000000.png"):
        assert (two / "plots" / name).read_bytes()[:4] == b"\x89PNG"


def test_only_a_chain_of_matrices_has_a_product(tiny_data: Path, tmp_path: Path) -> None:
    recipe = watched(tiny_data, strategy="single").set("callbacks.singular_values.product", True)
    with pytest.raises(
        UserError, match=r"product: model\.stem\.0 gives 4 and .* takes 36: a product"
    ):
        tiny_run(recipe, tmp_path / "run", steps=4)
    bare = recipe.set("evaluate", None)
    with pytest.raises(UserError, match="similarity: needs an evaluate section"):
        tiny_run(bare, tmp_path / "bare", steps=4)
