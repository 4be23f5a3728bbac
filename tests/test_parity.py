"""N ranks compute what one rank computes: every strategy, three models, with and without accumulation.

Two ways (docs/decisions/0003): step-locked, from each of 20 reference states, every gradient tensor and loss; and
free-running, where differences may grow as chaos lets them, against the floor that one process shows when it
merely sums its micro-batches in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest

from dist_train.testing import spawn_ranks

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
STEP_LOCKED = 1e-6
STEPS = 20
GRID = [[m, s, a] for m in cases.MODELS for s in STRATEGIES for a in (1, 2)]
QUICK = [["wgan_gp", "zero3", 2], ["wgan_gp", "ddp", 1]]
REST = [case for case in GRID if case not in QUICK]
"""For `make soak`. tests/test_parity_grid.py has a pairwise cover of more models, ranks and clippings."""


@pytest.fixture(scope="module")
def grid(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compared(QUICK, tiny_data, str(tmp_path_factory.mktemp("parity")))


@pytest.fixture(scope="module")
def rest(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compared(REST, tiny_data, str(tmp_path_factory.mktemp("parity")))


def compared(grid: list[Any], tiny_data: Path, folder: str) -> dict[str, Any]:
    plans = {
        f"{model}-{count}": cases.tiny_recipe(model, tiny_data, micro_batches=count).as_dict()
        for model in sorted({model for model, *_ in grid})
        for count in (2, 4)
    }
    (truth,) = spawn_ranks(1, cases.references, plans, folder, STEPS, timeout=200)
    return spawn_ranks(2, cases.parity_grid, grid, truth, str(tiny_data), folder, timeout=280)[0]


@pytest.mark.parametrize(("model", "strategy", "accumulation"), QUICK)
def test_parity(grid: dict[str, Any], model: str, strategy: str, accumulation: int) -> None:
    assert_parity(grid, model, strategy, accumulation)


@pytest.mark.soak
@pytest.mark.parametrize(("model", "strategy", "accumulation"), REST)
def test_more_parity(rest: dict[str, Any], model: str, strategy: str, accumulation: int) -> None:
    assert_parity(rest, model, strategy, accumulation)


def assert_parity(grid: dict[str, Any], model: str, strategy: str, accumulation: int) -> None:
    found = grid[f"{model}-{strategy}-{accumulation}"]
    worst = {
        kind: f"{w['difference']:.1e} ({w['bound']:.0e})" for kind, w in found["worst"].items()
    }
    print(f"{model} {strategy} x{accumulation}: {worst}")
    assert found["passed"], (found["first"], found["cause"])
    for kind in ("loss", "gradient"):
        assert found["worst"][kind]["difference"] <= STEP_LOCKED, found["worst"][kind]["where"]


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1.0) for a, b in zip(first, second, strict=True))


def test_float64_leaves_no_doubt(tiny_data: Path, tmp_path: Path) -> None:
    """In float64 20 free steps of two ranks under ddp are those of one process to 1e-10."""
    one = spawn_ranks(1, cases.in_float64, "single", str(tiny_data), str(tmp_path), timeout=240)[0]
    two = spawn_ranks(2, cases.in_float64, "ddp", str(tiny_data), str(tmp_path), timeout=240)[0]
    for model in cases.MODELS:
        found = largest(one[model], two[model])
        print(f"{model}: largest relative difference of a loss {found:.1e}")
        assert found <= 1e-10, model
