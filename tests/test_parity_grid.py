"""A pairwise cover of the parity grid (the whole of it is `make parity`), float64, and bf16 within a stated bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_cases
import pytest
from parity_cases import BOUND, FACTORS, Case

from dist_train.testing import spawn_ranks

CASES = parity_cases.pairwise()
RANKS = FACTORS[2]
ROUNDING = 2.0**-6
"""Of a loss in bf16, relative to the same run in fp32: a few roundings to 8 bits."""


@pytest.fixture(scope="module")
def grid(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    data, folder = str(tiny_data), str(tmp_path_factory.mktemp("grid"))
    spawn_ranks(1, parity_cases.references, CASES, data, folder, timeout=300)
    found: dict[str, dict[str, Any]] = {}
    for ranks in RANKS:
        mine = [case for case in CASES if case[2] == ranks]
        found |= spawn_ranks(ranks, parity_cases.grid, mine, data, folder, timeout=300)[0]
    for name, entries in parity_cases.failures(found, data, folder).items():
        found[name]["beyond"] = entries
    return found


def test_the_cover_is_pairwise() -> None:
    met = {(i, j, case[i], case[j]) for case in CASES for i in range(5) for j in range(5) if i < j}
    every = sum(len(FACTORS[i]) * len(FACTORS[j]) for i in range(5) for j in range(5) if i < j)
    assert len(met) == every


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step_locked(grid: dict[str, dict[str, Any]], case: Case) -> None:
    """Samples, losses, gradients, and all that each of five steps leaves, to 1e-6 or near its own floor."""
    found = grid[parity_cases.case_name(case)]
    assert {"samples", "loss", "gradient", "state"} <= set(found["worst"])
    assert max(found["worst"].values()) <= BOUND or found["beyond"], found
    for entry, (difference, floor) in found["beyond"].items():
        assert parity_cases.within(difference, floor), (entry, difference, floor)


@pytest.fixture(scope="module")
def free(tiny_data: Path) -> dict[str, dict[str, list[float]]]:
    """Losses of free runs: {"float64-2": ...}."""
    found = {}
    for precision, ranks, strategies in (
        ("float64", 1, ["single"]),
        ("float64", 2, ["ddp"]),
        ("float64", 4, ["ddp"]),
        ("fp32", 1, ["single"]),
        ("bf16", 1, ["single"]),
        ("bf16", 2, ["ddp", "zero2", "zero3", "fsdp2"]),
    ):
        found[f"{precision}-{ranks}"] = spawn_ranks(
            ranks, parity_cases.losses, precision, strategies, str(tiny_data), timeout=200
        )[0]
    return found


def largest(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1.0) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.parametrize("family", FACTORS[0])
def test_float64_leaves_no_doubt(
    free: dict[str, dict[str, list[float]]], family: str, ranks: int
) -> None:
    truth = free["float64-1"][f"{family}-single"]
    assert largest(truth, free[f"float64-{ranks}"][f"{family}-ddp"]) <= 1e-10


@pytest.mark.parametrize("family", FACTORS[0])
def test_bf16_is_fp32_rounded(free: dict[str, dict[str, list[float]]], family: str) -> None:
    if f"{family}-single" not in free["bf16-1"]:
        pytest.skip("this CPU has no recurrent layers in bf16")
    truth = free["fp32-1"][f"{family}-single"]
    rounded = [free["bf16-1"][f"{family}-single"]]
    rounded += [free["bf16-2"][f"{family}-{name}"] for name in ("ddp", "zero2", "zero3", "fsdp2")]
    for losses in rounded:
        assert 0 < largest(truth, losses) <= ROUNDING
