"""The watcher of one rank: a small process that sees that the rank no longer moves, says where it hangs, and ends it.

`heartbeat.py` starts it as a script of the standard library alone, so that it costs 10 ms and little memory. It reads
the rank's beats from shared memory, so it needs nothing of the rank, neither its interpreter nor its consent.

When its rank has not moved for `hang_after` seconds it writes `watch/stuck-RANK.json` with the rank's stacks, waits for
the other watchers to do the same (in a hang all ranks stand still: those not at fault wait in a collective), and ends
its rank. The lowest rank's watcher writes the report, to `logs/hang.txt` and standard error, before any rank is ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PHASES = (
    *("start", "data", "forward", "backward", "reduce", "step", "callbacks"),
    *("evaluate", "save", "end"),
)
"""Nothing is expected of a rank in `start` and `end`."""
RECORD = struct.Struct("<qqq")
"""What a rank's file holds: its step, its phase as an index of PHASES, its beats so far."""
STACKS = signal.SIGQUIT
"""Makes a rank write the Python stacks of its threads to `logs/stacks-RANK.txt`, whoever holds the interpreter."""
IN_COLLECTIVE = re.compile(r"/torch/distributed/|/deepspeed/comm/")


def watch(directory: Path, rank: int, size: int, hang_after: float) -> None:
    """Return when the rank ends; end it when it hangs."""
    pid, beats = os.getppid(), directory / "watch" / f"rank-{rank}"
    poll = min(1.0, hang_after / 10)
    last, still, woken = b"", 0.0, time.monotonic()
    while still < hang_after:
        if select.select([sys.stdin], [], [], poll)[0] or os.getppid() != pid:
            return
        now, record = time.monotonic(), beats.read_bytes()
        phase = PHASES[RECORD.unpack(record)[1]]
        if phase == "save":  # one beat, however much it writes
            record += _saved(pid)
        still += min(
            now - woken, 2 * poll
        )  # more: this process stood still too, the job is suspended
        woken = now
        if record != last or phase in ("start", "end"):
            last, still = record, 0.0
    folder = directory / "watch"
    stopped = _is_stopped(pid)
    if stopped:  # it must move to write its stacks: not before the others' watchers have seen theirs stand still
        time.sleep(hang_after / 4)
    _publish(folder / f"stuck-{rank}.json", _examine(directory, rank, pid, stopped))
    stuck = _gather(folder, size, patience=hang_after / 2)
    told = folder / "told.json"
    if rank == min(stuck):
        blamed, clause = blame(stuck, size)
        text = report(stuck, f"hang: nothing moved for {hang_after:g} s: {clause}")
        with (directory / "logs" / "hang.txt").open("a") as file:
            file.write(text)
        sys.stderr.write(text)
        sys.stderr.flush()
        _publish(told, blamed)
    _wait(told.exists, hang_after / 2)
    if told.exists() and rank not in json.loads(told.read_text()):
        time.sleep(0.5)  # so that the first rank to end is one at fault
    _end(pid)


def _end(pid: int) -> None:
    """By a signal that says why; by SIGKILL, if that does nothing."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGALRM)
        _wait(lambda: os.getppid() != pid, 2.0)
        os.kill(pid, signal.SIGKILL)


def _examine(directory: Path, rank: int, pid: int, stopped: bool) -> dict[str, Any]:
    """Where the rank stands, and its stacks, for which a stopped process is continued."""
    step, phase, _ = RECORD.unpack((directory / "watch" / f"rank-{rank}").read_bytes())
    file = directory / "logs" / f"stacks-{rank}.txt"
    begin = file.stat().st_size
    os.kill(pid, STACKS)
    if stopped:
        os.kill(pid, signal.SIGCONT)
    sizes = [begin]

    def written() -> bool:
        sizes.append(file.stat().st_size)
        return begin < sizes[-2] == sizes[-1]

    _wait(written, 5.0)
    stacks = file.read_bytes()[begin:].decode(errors="replace")
    place = {"step": step, "phase": PHASES[phase], "host": socket.gethostname(), "process": pid}
    return place | {"stopped": stopped, "stacks": stacks}


def _saved(pid: int) -> bytes:
    """What changes as the process reads and writes files, or waits for a disk (Linux; elsewhere nothing does).

    In units of 16 MiB: the few bytes that it hears from the other ranks by their store are no sign of a save.
    """
    if _state(pid) == "D":
        return str(time.monotonic()).encode()
    with contextlib.suppress(OSError):
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return str((int(counts["rchar"]) + int(counts["wchar"])) >> 24).encode()
    return b""


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process (Linux; elsewhere it looks like any other hang)."""
    return _state(pid) in ("T", "t")


def _state(pid: int) -> str:
    """The letter by which the kernel tells what a process does, "" where it does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _publish(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def _gather(folder: Path, size: int, patience: float) -> dict[int, dict[str, Any]]:
    """What every rank's watcher has published, of those that do in time."""
    _wait(lambda: len(list(folder.glob("stuck-*.json"))) == size, patience)
    return {
        int(path.stem.partition("-")[2]): json.loads(path.read_text())
        for path in folder.glob("stuck-*.json")
    }


def _wait(done: Any, patience: float) -> None:
    deadline = time.monotonic() + patience
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def report(stuck: Mapping[int, Mapping[str, Any]], headline: str) -> str:
    """Where each rank stands, and the stacks of all."""
    lines = [headline]
    for rank, at in sorted(stuck.items()):
        how = "stopped" if at["stopped"] else "waits for the others" if _waits(at) else "held"
        where = f"step {at['step']}, {at['phase']}: {how} (process {at['process']} on {at['host']})"
        lines.append(f"  rank {rank}: {where}")
    for rank, at in sorted(stuck.items()):
        lines += ["", f"stacks of rank {rank}:", at["stacks"].rstrip() or "(none were written)"]
    return "\n".join(lines) + "\n"


def blame(stuck: Mapping[int, Mapping[str, Any]], size: int) -> tuple[list[int], str]:
    """The ranks at fault, and a clause that names them, the step and the phase."""
    stopped = [rank for rank in sorted(stuck) if stuck[rank]["stopped"]]
    if stopped:
        return stopped, f"{_ranks(stopped)} stopped by a signal {_place(stuck[stopped[0]])}"
    held = [rank for rank in sorted(stuck) if not _waits(stuck[rank])]
    if held:
        return held, f"{_ranks(held)} held {_place(stuck[held[0]])}"
    silent = [rank for rank in range(size) if rank not in stuck]
    if silent:
        where = _place(stuck[min(stuck)])
        return silent, f"{_ranks(silent)} gone, or moving elsewhere, while others wait {where}"
    places: dict[str, list[int]] = {}
    for rank in sorted(stuck):
        places.setdefault(_place(stuck[rank]), []).append(rank)
    if len(places) == 1:
        return sorted(
            stuck
        ), f"all ranks wait {_place(stuck[0])}: the network, or other collectives"
    fewest = min(places.values(), key=len)
    clauses = "; ".join(f"{_ranks(ranks)} waiting {place}" for place, ranks in places.items())
    return fewest, f"collectives do not match: {clauses}"


def _place(at: Mapping[str, Any]) -> str:
    return f"in step {at['step']}, {at['phase']}"


def _waits(at: Mapping[str, Any]) -> bool:
    """Whether a rank is in a collective, where the others may keep it waiting."""
    return at["phase"] == "reduce" or bool(IN_COLLECTIVE.search(at["stacks"]))


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job, meant for its ranks
    place = json.loads(sys.argv[1])
    watch(Path(place["directory"]), place["rank"], place["size"], place["hang_after"])
