"""A rank that stands still is found, named with its step and phase, and ended; a rank that is late is named."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import pytest
from slurm_cluster import SEARCHED, wait_for

from dist_train import run, watch
from dist_train.callbacks.stragglers import straggler
from dist_train.run_directory import RunDirectory
from dist_train.testing import RankFailed, assert_same_run, spawn_ranks

LIMIT = 3.0
ENVIRON = os.environ | {"PATH": SEARCHED}
LINK = ["unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"]

# (what happens, ranks) and what the report must begin with
HANGS = {
    ("stop@backward:1:9", 2): "rank 1 stopped by a signal in step 5, backward",
    ("hold@reduce:0:5", 2): "rank 0 held in step 6, step",
    ("stop@save:1:0", 2): "rank 1 stopped by a signal in step 6, save",
    ("hold@evaluate:0:2", 1): "rank 0 held in step 6, evaluate",
    (
        "mismatched",
        2,
    ): "collectives do not match: rank 0 waiting in step 6, reduce; rank 1 waiting in step 5, callbacks",
}


def recipe(data: Path) -> Any:
    made = cases.tiny_recipe("resnet", data, watch__hang_after=LIMIT)
    section = {"split": "test", "every": "6 steps", "metrics": ["accuracy"]}
    return made.set("evaluate", section)


@pytest.mark.parametrize(("what", "ranks"), HANGS)
def test_a_hang_is_found_named_and_ended(
    tiny_data: Path, tmp_path: Path, what: str, ranks: int
) -> None:
    plan, fault = recipe(tiny_data), what
    if what == "mismatched":
        plan, fault = plan.set("callbacks.mismatched", {"name": "cases:Mismatched"}), ""
    with pytest.raises(RankFailed, match=r"rank-\d was ended by SIGALRM \(it hung"):
        spawn_ranks(
            ranks, cases.train_case, plan.as_dict(), str(tmp_path / "run"), fault, None, timeout=240
        )
    report = (tmp_path / "run" / "logs" / "hang.txt").read_text()
    assert report.startswith(f"hang: nothing moved for {LIMIT:g} s: {HANGS[what, ranks]}"), report
    stacks = report.split("\nstacks of rank ")[1:]
    assert len(stacks) == ranks
    assert all("loop.py" in text and "in train" in text for text in stacks), report


def test_a_network_that_falls_silent(tiny_data: Path, tmp_path: Path) -> None:
    """Two nodes, each in a network of its own: what they send comes to nobody, and no connection is closed."""
    if shutil.which("ip", path=SEARCHED) is None or subprocess.run(LINK, env=ENVIRON).returncode:
        pytest.skip("needs root that may make networks, and iproute2")
    plan = cases.tiny_recipe("resnet", tiny_data, watch__hang_after=LIMIT).set(
        "log.every", "1 step"
    )
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    plan = plan.set("callbacks.checkpoint.every", "1 step")
    recipe.write_text(plan.set("duration", "100000 steps").to_yaml())
    train = [sys.executable, "-m", "dist_train", "train", recipe, "--run-dir", run_dir]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    common |= {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29400"}
    ranks = [
        subprocess.Popen(
            ["unshare", "--net", "sh", "-c", 'read go && exec "$@"', "rank", *train],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | common | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": f"cable{rank}"},
        )
        for rank in range(2)
    ]

    def ip(rank: int | None, *words: str) -> None:
        inside = [] if rank is None else ["nsenter", f"--net=/proc/{ranks[rank].pid}/ns/net"]
        subprocess.run([*inside, "ip", *words], check=True, timeout=10, env=ENVIRON)

    def in_its_own_network(process: subprocess.Popen[bytes]) -> bool:
        return os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net")

    try:
        wait_for(lambda: all(map(in_its_own_network, ranks)), "two networks", 30)
        first, second = (str(process.pid) for process in ranks)
        peer = ("peer", "name", "cable1", "netns", second)
        ip(None, "link", "add", "cable0", "netns", first, "type", "veth", *peer)
        for rank, process in enumerate(ranks):
            ip(rank, "link", "set", "lo", "up")
            ip(rank, "address", "add", f"10.99.0.{rank + 1}/24", "dev", f"cable{rank}")
            ip(rank, "link", "set", f"cable{rank}", "up")
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.close()
        wait_for(lambda: len(RunDirectory(run_dir).rows()) > 20, "some steps")
        for rank in range(2):  # frames for the other now go to a card that there is not
            nowhere = ("lladdr", "02:00:00:00:00:01", "nud", "permanent")
            ip(rank, "neighbour", "replace", f"10.99.0.{2 - rank}", "dev", f"cable{rank}", *nowhere)
        assert [process.wait(60) for process in ranks] == [-signal.SIGALRM] * 2
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    report = (run_dir / "logs" / "hang.txt").read_text()
    assert report.startswith(f"hang: nothing moved for {LIMIT:g} s: all ranks wait in step"), report


def test_a_run_that_hangs_is_started_again_and_is_the_unbroken_run(
    tiny_data: Path, tmp_path: Path
) -> None:
    arguments = {"name": "cases:StopsOnce", "mark": str(tmp_path / "stopped")}
    plan = recipe(tiny_data).set("callbacks.trace", {"name": "dist_train.testing:Trace"})
    plan = plan.set("callbacks.stops_once", arguments)
    hung, whole = tmp_path / "hung", tmp_path / "whole"
    run.train(plan, ranks=2, run_dir=hung, max_restarts=1)
    assert "rank 0 stopped by a signal in step 9, callbacks" in (hung / "logs/hang.txt").read_text()
    run.train(plan, ranks=2, run_dir=whole)
    assert not (whole / "logs" / "hang.txt").exists()
    assert_same_run(whole, hung)


def test_a_late_rank_is_named(tiny_data: Path, tmp_path: Path) -> None:
    plan = cases.tiny_recipe("resnet", tiny_data, duration="60 steps", log__every="10 steps")
    plan = plan.set("callbacks.late", {"name": "cases:Late"})
    spawn_ranks(2, cases.train_cases, [[plan.as_dict(), str(tmp_path / "run"), None]], timeout=240)
    rows = {row["step"]: row.get("straggler") for row in RunDirectory(tmp_path / "run").rows()}
    assert rows[10] is None
    assert {rows[step] for step in (30, 40, 50, 60)} == {1}
    note = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert len(re.findall(r"rank 1 keeps the others waiting: \d+\.\d ms", note)) == 1


@pytest.mark.parametrize(
    ("own", "step", "expected"),
    [
        ([1.0, 1.5], 1.6, 1),
        ([1.0, 1.5, 1.0, 1.0], 1.6, 1),
        ([1.0, 1.2, 1.0, 1.0], 1.6, None),  # not much slower
        ([0.01, 0.02], 1.0, None),  # much slower in what hardly matters
        ([1.0, 1.0], 1.0, None),
        ([0.0, 0.0], 0.0, None),
    ],
)
def test_late_is_late_and_matters(own: list[float], step: float, expected: int | None) -> None:
    assert straggler(own, step) == expected


def at(step: int, phase: str, stopped: bool = False, stacks: str = "") -> dict[str, Any]:
    return {"step": step, "phase": phase, "stopped": stopped, "stacks": stacks}


WAITS = 'File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce'


@pytest.mark.parametrize(
    ("stuck", "size", "ranks", "clause"),
    [
        ({0: at(7, "reduce"), 1: at(7, "data")}, 2, [1], "rank 1 held in step 7, data"),
        ({0: at(7, "reduce"), 1: at(7, "save", stacks=WAITS)}, 3, [2], "rank 2 gone, or moving"),
        ({n: at(7, "reduce") for n in range(3)}, 3, [0, 1, 2], "all ranks wait in step 7, reduce"),
        (
            {0: at(7, "reduce"), 1: at(7, "reduce"), 2: at(8, "reduce")},
            3,
            [2],
            "collectives do not match: ranks 0, 1 waiting in step 7, reduce; rank 2 waiting in step 8",
        ),
        ({0: at(7, "reduce"), 1: at(7, "data", True)}, 2, [1], "rank 1 stopped by a signal"),
    ],
)
def test_who_is_at_fault(stuck: Any, size: int, ranks: list[int], clause: str) -> None:
    blamed, text = watch.blame(stuck, size)
    assert blamed == ranks
    assert text.startswith(clause)


class Found(Exception):
    """The watcher would end its rank."""


def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Iterator[object]) -> None:
    """Watch this process with a limit of 5 s, by a clock that moves on by the watcher's poll each time that it looks:
    between two looks the rank lives on to its next `yield`. Raises Found if the watcher loses its patience."""
    (tmp_path / "watch").mkdir()
    now = 0.0

    def look(_: object, __: object, ___: object, poll: float) -> tuple[list[object], ...]:
        nonlocal now
        now += poll
        ended = next(life, life) is life
        return ([sys.stdin] if ended else [], [], [])

    def found(*_: object) -> None:
        raise Found

    monkeypatch.setattr(watch, "select", SimpleNamespace(select=look))
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(watch, "_is_stopped", found)
    monkeypatch.setattr(os, "getppid", os.getpid)
    watch.watch(tmp_path, 0, 1, 5.0)


def beat(folder: Path, phase: str, number: int) -> None:
    place = watch.PHASES.index(phase)
    (folder / "watch" / "rank-0").write_bytes(watch.RECORD.pack(0, place, number))


@pytest.mark.parametrize(("bytes_a_second", "found"), [(16 << 20, False), (1 << 20, True)])
def test_a_save_that_writes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_a_second: int, found: bool
) -> None:
    def saves() -> Iterator[object]:
        beat(tmp_path, "save", 1)
        with (tmp_path / "tensors").open("wb", 0) as file:
            for _ in range(20):  # of half a second
                file.seek(0)
                yield file.write(bytes(bytes_a_second // 2))

    with pytest.raises(Found) if found else contextlib.nullcontext():
        watched(tmp_path, monkeypatch, saves())


@pytest.mark.parametrize(
    ("beats", "phase", "found"),
    [(True, "evaluate", False), (False, "evaluate", True), (False, "start", False)],
)
def test_a_watched_rank_that_moves_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool, phase: str, found: bool
) -> None:
    """Also where it takes longer than the limit in all, and where nothing is expected of it."""

    def lives() -> Iterator[object]:
        for second in range(20):
            yield beat(tmp_path, phase, second if beats else 1)

    with pytest.raises(Found) if found else contextlib.nullcontext():
        watched(tmp_path, monkeypatch, lives())
