"""What becomes of ranks and their children when one of them, or their launcher, ends badly; and of starting again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import rank_cases
from slurm_cluster import wait_for

from dist_train.ranks import start_ranks
from dist_train.recipe import Recipe
from dist_train.run import train
from dist_train.testing import RankFailed, assert_same_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("os._exit(0)", "rank-1 ended with exit code 0 before its work was done"),
        ("sys.exit(0)", "SystemExit"),
        ("abort", "rank-1 was ended by SIGABRT"),
        ("segfault", "rank-1 was ended by SIGSEGV"),
    ],
)
def test_no_bad_end_is_taken_for_success(how: str, said: str) -> None:
    with pytest.raises(RankFailed, match=said.replace("(", r"\(")):
        start_ranks(2, rank_cases.end_badly, how, 1, timeout=240)


def test_what_failed_in_turn_is_said_after_the_cause() -> None:
    with pytest.raises(RankFailed) as caught:
        start_ranks(2, rank_cases.end_badly, "sys.exit(0)", 1, timeout=240)
    first, _, rest = str(caught.value).partition("\n")
    assert first == "rank-1 failed:"
    assert "rank-0 failed in turn: " not in rest or rest.index("SystemExit") < rest.index("rank-0")


@pytest.fixture
def launched(tmp_path: Path, request: pytest.FixtureRequest) -> subprocess.Popen[bytes]:
    """A launcher whose two ranks have a stubborn child each; the second rank may stop or kill itself. It begins with
    SIGINT ignored, as the jobs do that a shell has put in the background."""
    call = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    call += f"it.launcher(it.with_children, {str(tmp_path)!r}, {request.param!r})"
    environ = {**os.environ, "PYTHONPATH": str(Path(cases.__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", f"import launcher_cases as it; {call}"],
        env=environ,
        stderr=subprocess.DEVNULL,
    )


def alive(folder: Path) -> list[int]:
    """Those of the ranks and their children that still run."""
    pids = [int(pid) for file in folder.glob("pids-*") for pid in file.read_text().split()]
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX":
                found.append(pid)
    return found


@pytest.mark.parametrize(
    ("launched", "number"),
    [
        ("run", signal.SIGKILL),
        ("stop", signal.SIGKILL),  # a stopped process cannot end itself
        ("run", signal.SIGTERM),
        ("run", signal.SIGINT),
        ("kill", None),  # of a rank
    ],
    indirect=["launched"],
)
def test_nothing_outlives_the_launcher_nor_a_rank(
    launched: subprocess.Popen[bytes], tmp_path: Path, number: int | None
) -> None:
    try:
        wait_for(lambda: len(list(tmp_path.glob("pids-*"))) == 2, "the ranks", 100)
        if number is not None:
            launched.send_signal(number)
        code = launched.wait(60)
        assert code != 0
    finally:
        launched.kill()
        launched.wait()
    wait_for(lambda: not alive(tmp_path), f"the end of {alive(tmp_path)}", 60)


def failing(data: Path, once: bool) -> Recipe:
    recipe = cases.tiny_recipe("resnet", data, duration="12 steps")
    recipe = recipe.set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    return recipe.set("callbacks.failing", {"name": "rank_cases:Failing", "step": 8, "once": once})


def test_failed_ranks_start_again(tiny_data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = failing(tiny_data, once=True)
    with pytest.raises(RankFailed, match="planted"):
        train(recipe, run_dir=broken, ranks=2)
    (broken / "failed-before").unlink()
    train(recipe, run_dir=broken, ranks=2, resume="auto", max_restarts=1)
    train(recipe.set("callbacks.failing", None), run_dir=whole, ranks=2)
    assert_same_run(whole, broken)


def test_a_loop_of_crashes_ends(tiny_data: Path, tmp_path: Path) -> None:
    """Step 6 is saved, step 8 fails always: the first failure has led on, two more have not."""
    with pytest.raises(RankFailed, match=r"(?s)rank-1 failed:.*planted"):
        train(failing(tiny_data, once=False), run_dir=tmp_path / "run", ranks=2, max_restarts=2)
    starts = (tmp_path / "run" / "command.txt").read_text().splitlines()
    assert len(starts) == 4
