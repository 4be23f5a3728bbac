"""Tiny real data for every test, packed once, and what each file of tests costs."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ranks import the cases that tests hand to them

os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("DIST_TRAIN_TIMEOUT", "120")
os.fsync = lambda handle: None  # no test cuts the power, and each costs 10 ms; as in `cases`

FIRST = (
    "test_slurm",
    "test_ray",
    "test_launchers",
    "test_parity_grid",
    "test_curriculum",
    "test_engine",
)
"""What takes longest, so that the workers of `make test` end together; Ray beside Slurm, which leaves it most of the
cores: it gives up where a node takes 30 s to start."""
seconds: Counter[str] = Counter()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `digits` (8x8 images) and `text` (pieces of 2 to 33 bytes) as shards."""
    from cases import pack_tiny_data

    folder = tmp_path_factory.mktemp("data")
    pack_tiny_data(folder)
    return folder


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Starts processes that have none of this one's threads and locks, from the fork server that ranks come from."""
    from dist_train.ranks import warm_up

    warm_up()
    return get_context("forkserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))


def pytest_collection_finish() -> None:
    """What is imported by now need not be looked through at each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds[report.nodeid.partition("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds of every file that takes some, so that growth is seen when it lands."""
    shown = [(name, spent) for name, spent in seconds.most_common() if spent >= 1]
    if len(seconds) > 1:
        terminalreporter.section(f"{sum(seconds.values()):.0f} s of tests by file")
        for name, spent in shown:
            terminalreporter.write_line(f"{spent:6.1f} s {name}")
