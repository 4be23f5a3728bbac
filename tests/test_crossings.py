"""Checkpoints cross every pair of strategies and of 1, 2 and 4 ranks (`make soak`; 2 and 1 ranks: test_engine.py)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import engine_cases
import pytest
from test_engine import EXACT, difference

from dist_train import checkpoint
from dist_train.testing import spawn_ranks

pytestmark = pytest.mark.soak
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PLACES = {1: ("single", *STRATEGIES), 2: STRATEGIES, 4: (*STRATEGIES, "fsdp2-hybrid")}
ENDS = [f"{name}-{ranks}" for ranks, names in PLACES.items() for name in names]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every world has saved, and what every world made of each."""
    folder = str(tmp_path_factory.mktemp("crossings"))
    saved: dict[str, Any] = {}
    for ranks, names in PLACES.items():
        saved |= spawn_ranks(ranks, engine_cases.save_here, names, folder, timeout=240)[0]
    loaded: dict[str, Any] = {}
    for ranks, names in PLACES.items():
        work = (engine_cases.load_here, list(saved), names, folder)
        loaded |= spawn_ranks(ranks, *work, timeout=240)[0]
    digests = {name: checkpoint.weights_digest(Path(folder) / name) for name in saved}
    return {"saved": saved, "loaded": loaded, "digests": digests}


@pytest.mark.parametrize(("source", "target"), list(itertools.product(ENDS, ENDS)))
def test_every_pair(crossed: dict[str, Any], source: str, target: str) -> None:
    """Bit for bit what was saved, and the step after it is the next one of plain AdamW."""
    found = crossed["loaded"][f"{source} -> {target}"]
    assert checkpoint.weights_digest(Path(found["folder"])) == crossed["digests"][source]
    assert found["steps"] == 3.0
    assert found["evaluated"] == crossed["saved"][source]
    truth = engine_cases.plain_adamw(4)
    assert difference({name: found["after"][name] for name in truth}, truth) <= 10 * EXACT
