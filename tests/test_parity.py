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

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
STEP_LOCKED = 1e-6
FREE_RUNNING = 10.0
GRID = [[m, s, a] for m in cases.MODELS for s in STRATEGIES for a in (1, 2)]


@pytest.fixture(scope="module")
def truth(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parity")
    (found,) = spawn_ranks(
        1, cases.references, list(cases.MODELS), [2, 4], str(tiny_data), str(folder), timeout=200
    )
    return folder, found


@pytest.fixture(scope="module")
def grid(truth: tuple[Path, dict[str, Any]], tiny_data: Path) -> dict[str, Any]:
    return spawn_ranks(2, cases.parity_grid, GRID, str(tiny_data), str(truth[0]), timeout=280)[0]


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1.0) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("model", "strategy", "accumulation"), GRID)
def test_step_locked(grid: dict[str, Any], model: str, strategy: str, accumulation: int) -> None:
    found = grid[f"{model}-{strategy}-{accumulation}"]
    print(
        f"{model} {strategy} x{accumulation}: loss {found['loss']:.1e}, gradient {found['gradient']:.1e}"
    )
    assert found["loss"] <= STEP_LOCKED
    assert found["gradient"] <= STEP_LOCKED, found["where"]


@pytest.mark.parametrize(("model", "strategy", "accumulation"), GRID)
def test_free_running(
    grid: dict[str, Any],
    truth: tuple[Path, dict[str, Any]],
    model: str,
    strategy: str,
    accumulation: int,
) -> None:
    single = truth[1]
    micro_batches = 2 * accumulation
    floor = largest(single[f"{model}-4-forward"], single[f"{model}-4-reversed"])
    found = largest(
        grid[f"{model}-{strategy}-{accumulation}"]["losses"],
        single[f"{model}-{micro_batches}-forward"],
    )
    print(
        f"{model} {strategy} x{accumulation}: largest difference of a loss {found:.1e}, floor {floor:.1e}"
    )
    assert found <= FREE_RUNNING * floor


BUGS = [
    ["wrong loss scale", "transformer", "zero2"],
    ["wrong loss scale", "wgan_gp", "zero3"],
    ["forgotten reduction", "resnet", "ddp"],
    ["local clip norm", "transformer", "ddp"],
]


def test_planted_bugs_are_found(truth: tuple[Path, dict[str, Any]], tiny_data: Path) -> None:
    found = spawn_ranks(2, cases.broken_grid, BUGS, str(tiny_data), str(truth[0]), timeout=120)[0]
    for case, difference in found.items():
        assert difference["gradient"] > 1000 * STEP_LOCKED, case


def test_float64_leaves_no_doubt(tiny_data: Path, tmp_path: Path) -> None:
    """In float64 20 free steps of two ranks under ddp are those of one process to 1e-10."""
    one = spawn_ranks(1, cases.in_float64, "single", str(tiny_data), str(tmp_path), timeout=60)[0]
    two = spawn_ranks(2, cases.in_float64, "ddp", str(tiny_data), str(tmp_path), timeout=60)[0]
    for model in cases.MODELS:
        found = largest(one[model], two[model])
        print(f"{model}: largest relative difference of a loss {found:.1e}")
        assert found <= 1e-10, model
