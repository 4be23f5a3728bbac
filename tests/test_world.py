"""What ranks tell each other, and what is left when one of them falls: a message that names it, and no process."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_cases as cases
import launcher_cases
import pytest

from dist_train.errors import UserError
from dist_train.testing import RankFailed, spawn_ranks
from dist_train.world import World

OTHERS = pytest.mark.parametrize("others", ("in a collective", "by themselves"))


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return spawn_ranks(3, cases.talk, timeout=240)


def test_every_rank_knows_its_place(told: list[dict[str, Any]]) -> None:
    assert [t["place"] for t in told] == [[r, 3, r, 3, r == 0] for r in range(3)]


def test_gather_is_in_order_of_rank_on_every_rank(told: list[dict[str, Any]]) -> None:
    expected = [{"rank": r, "text": "\u00e9" * (100 * r), "none": None} for r in range(3)]
    assert all(t["gathered"] == expected for t in told)
    assert all(t["floats"] == [[0.1 + r, float("inf")] for r in range(3)] for t in told)


def test_agree_is_what_rank_0_says(told: list[dict[str, Any]]) -> None:
    assert all(t["agreed"] == ["rank", 0] for t in told)


def test_sum_and_broadcast(told: list[dict[str, Any]]) -> None:
    assert all(t["sum"] == [6.0, 60.0] for t in told)
    assert all(t["broadcast"] == [3.0, 30.0] for t in told)


def test_one_process_is_a_world() -> None:
    import torch

    world = World.join({})
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert world.agree("x") == "x"
    assert world.sum_(torch.tensor(2.0)) == 2
    world.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that fall


def assert_gone(folder: Path, ranks: int) -> None:
    """Every rank has left its id, and none is there any more."""
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    assert len(pids) == ranks
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert multiprocessing.active_children() == []


@OTHERS
def test_the_first_traceback_is_reported(tmp_path: Path, others: str) -> None:
    with pytest.raises(RankFailed) as caught:
        spawn_ranks(3, cases.fall, "error", 1, str(tmp_path), others, timeout=240)
    message = str(caught.value)
    assert message.startswith("rank-1 failed:\nTraceback")
    assert "ValueError: planted in rank 1" in message
    assert "in fall" in message, "the line of the user's own code"
    assert_gone(tmp_path, 3)


def test_a_user_error_stays_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        spawn_ranks(2, cases.fall, "user error", 1, str(tmp_path), "in a collective", timeout=240)
    assert str(caught.value) == "optimizer.rate: planted in rank 1"
    assert_gone(tmp_path, 2)


@OTHERS
def test_a_killed_rank_is_named(tmp_path: Path, others: str) -> None:
    """Also where the others fail first, because they have lost it."""
    with pytest.raises(RankFailed, match="rank-1 was ended by SIGKILL"):
        spawn_ranks(2, cases.fall, "kill", 1, str(tmp_path), others, timeout=240)
    assert_gone(tmp_path, 2)


def test_an_exit_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank-0 ended with exit code 3"):
        spawn_ranks(2, cases.fall, "exit", 0, str(tmp_path), "by themselves", timeout=240)
    assert_gone(tmp_path, 2)


def test_the_timeout_ends_hung_ranks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    with pytest.raises(RankFailed, match="rank-0, rank-1 still running after 1 s: ended"):
        spawn_ranks(2, launcher_cases.hang, str(fifo), timeout=1.0)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for foreign processes by pidfd")
def test_no_rank_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = f"import launcher_cases as it; it.launcher(it.hang, {str(fifo)!r})"
    environ = {**os.environ, "PYTHONPATH": str(Path(cases.__file__).parent)}
    starter = subprocess.Popen([sys.executable, "-c", code], env=environ)
    try:
        told, reader = b"", os.open(fifo, os.O_RDWR)  # for writing too, so that it has no end
        while told.count(b"\n") < 2:
            assert select.select([reader], [], [], 60)[0], "the ranks have not started"
            told += os.read(reader, 100)
        os.close(reader)
        handles = [os.pidfd_open(int(pid)) for pid in told.split()]
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    for handle in handles:
        ready, _, _ = select.select([handle], [], [], 20)
        os.close(handle)
        assert ready, "a rank is still there"
