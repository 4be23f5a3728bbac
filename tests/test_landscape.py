"""F12: exact on a quadratic and on a saddle; on a run, the curvature that the whole Hessian has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_train.diagnose.landscape import (
    directions,
    hessian_product,
    kind_of_point,
    lanczos,
    landscape,
)
from dist_train.recipe import Recipe
from dist_train.testing import tiny_run

CURVATURES = {
    "minimum": [0.5, 1.0, 2.0, 7.0, 11.0],
    "maximum": [-9.0, -4.0, -3.0, -1.0, -0.5],
    "saddle": [-3.0, -0.1, 0.2, 4.0, 5.0],
}


@pytest.mark.parametrize("kind", CURVATURES)
def test_quadratics_are_exact(kind: str) -> None:
    """loss = (w - c)' A (w - c) / 2 with a rotated A: products, eigenvalues and kind."""
    torch.manual_seed(0)
    expected = torch.tensor(CURVATURES[kind], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    matrix, centre = turn @ expected.diag() @ turn.T, torch.randn(5, dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return (w - centre) @ matrix @ (w - centre) / 2

    vector = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(hessian_product(loss, centre, vector), matrix @ vector)
    found = lanczos(lambda v: hessian_product(loss, centre, v), 5, 5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert kind_of_point(found) == kind


def test_lanczos_finds_both_ends_of_many_dimensions() -> None:
    expected = torch.cat([torch.tensor([-20.0]), torch.linspace(-1, 1, 498), torch.tensor([30.0])])
    found = lanczos(lambda v: expected.double() * v, 500, 30)
    assert len(found) == 30
    assert found[0].item() == pytest.approx(-20, rel=1e-6)
    assert found[-1].item() == pytest.approx(30, rel=1e-6)


def test_directions_span_a_flat_way() -> None:
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(40, 2, dtype=torch.float64)).Q.T
    way = torch.randn(6, 2, dtype=torch.float64) @ plane
    axes = directions(way)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2, dtype=torch.float64))
    offsets = way - way[-1]
    torch.testing.assert_close(offsets @ axes.T @ axes, offsets)
    short = directions(way[:1])
    torch.testing.assert_close(short @ short.T, torch.eye(2, dtype=torch.float64))


def test_softmax_regression_has_no_negative_curvature(tiny_data: Path, tmp_path: Path) -> None:
    """The loss of F1 is convex: no eigenvalue is below 0, wherever training stopped."""
    recipe = Recipe(
        duration="20 steps",
        data={"path": str(tiny_data / "digits"), "global_batch": 24, "micro_batch": 12},
        model={"name": "mlp", "depth": 0, "in_features": "auto", "num_outputs": "auto"},
        objective={"name": "classification"},
        optimizer={"name": "sgd", "learning_rate": 0.1},
        evaluate={"split": "test", "every": "20 steps", "metrics": ["loss"]},
        callbacks={"checkpoint": {"every": "5 steps", "keep": 4}},
    )
    run = tiny_run(recipe, tmp_path / "run", steps=20)
    found = landscape(run, batches=5, steps=12, grid=5)
    assert Path(found["plot"]).stat().st_size > 1000
    assert found["kind"] == "minimum"
    assert found["smallest_eigenvalue"] > -1e-3 * found["largest_eigenvalues"][0]
    assert found["largest_eigenvalues"] == sorted(found["largest_eigenvalues"], reverse=True)
    assert found["loss"] < 2.3 and found["gradient_norm"] > 0
