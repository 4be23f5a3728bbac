r"""The ranks of this machine: started together, supervised, ended together.

    launcher -- fork server -- rank 0 -- its own children
         \           \-------- rank 1 -- its own children
          \----------\-------- guard

Each rank leads a process group. The guard kills what is left of the groups as soon as the launcher lets go of a pipe:
because all is done, because a rank failed, or because the kernel closed it for a launcher that was killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dist_train.errors import Interrupted, UserError
from dist_train.ranks.parent import die_with_parent

FORWARDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""Signals to the launcher that mean "save and end", handed on to every rank."""


class RankFailed(RuntimeError):
    """A rank ended badly. The message holds the first failure's rank and traceback."""


def warm_up() -> None:
    """Start the fork server, which imports torch and deepspeed, while this process still does other things."""
    # a process cannot use CUDA if it forks from one that has asked for it, as importing DeepSpeed does
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    preload = ["dist_train.ranks.fork_server", *([] if has_gpu else ["dist_train.ranks.preload"])]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    forkserver.ensure_running()


def start_ranks(
    count: int,
    target: Callable[..., Any],
    *arguments: Any,
    environ: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> list[Any]:
    """Run `target(*arguments)` in `count` new processes that form one world; return what each returned (JSON values).

    On a machine without GPUs they fork from a server that has imported torch and deepspeed once, so a start costs
    little. When one fails, the others are ended, and its traceback is raised. No rank outlives this process, nor does
    anything that a rank started. Raises Interrupted when a signal to this process, or to a rank, let them save and end.
    """
    ranks = Ranks(count, target, *arguments, environ=environ)
    try:
        with ranks.forwarding():
            ranks.start()
            ranks.wait(timeout)
        return ranks.results()
    finally:
        ranks.end()


def _guard(pids: Connection) -> None:
    """Kill what is left of the ranks' process groups once the launcher has let go of the pipe or is gone."""
    os.setsid()
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    groups = []
    with suppress(EOFError, OSError):
        while True:
            groups.append(int(pids.recv_bytes()))
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        with suppress(ProcessLookupError):  # too early in its life to lead a group
            os.kill(group, signal.SIGKILL)


@contextmanager
def _main_left_out(target: Callable[..., Any]) -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in every rank, which only a target in it would need:
    so no script wants an `if __name__ == "__main__"`, and standard input and notebooks work."""
    main = sys.modules["__main__"]
    if target.__module__ != "__main__":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Ranks:
    """Ranks of this machine that start together, and what ended them. Whoever makes one calls `end`, whatever happens.

    Attributes:
        running: those that have not ended, by what `multiprocessing.connection.wait` waits for.
        told: the signals that they were sent.
    """

    def __init__(
        self,
        count: int,
        target: Callable[..., Any],
        *arguments: Any,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        warm_up()
        context = multiprocessing.get_context("forkserver")
        self._scratch = tempfile.TemporaryDirectory(prefix="dist-train-")
        self.scratch = Path(self._scratch.name)
        self._reader, self._writer = context.Pipe(duplex=False)
        self._guard = context.Process(target=_guard, args=(self._reader,), name="guard")
        self._target = target
        self.ranks = [
            context.Process(
                target=_run_rank,
                args=(
                    rank,
                    count,
                    self._scratch.name,
                    dict(os.environ) | dict(environ or {}),
                    target,
                    arguments,
                ),
                name=f"rank-{rank}",
            )
            for rank in range(count)
        ]
        self.running: dict[int, Any] = {}
        self.told: list[int] = []
        self.killed_for_memory = _oom_kills()

    def start(self) -> None:
        with _main_left_out(self._target):
            self._guard.start()
            self._reader.close()
            for process in self.ranks:
                process.start()
                self._writer.send_bytes(str(process.pid).encode())
        self.running = {process.sentinel: process for process in self.ranks}

    def wait(self, timeout: float | None = None) -> None:
        """Until all have ended well; raises what ended one of them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended = wait(list(self.running), timeout=left)
            if not ended:
                names = ", ".join(process.name for process in self.running.values())
                raise RankFailed(f"{names} still running after {timeout:.0f} s: ended")
            for sentinel in ended:
                self.ended(sentinel)

    def ended(self, sentinel: Any) -> None:
        """Take note of one that has ended; raises what ended it, if that was not the end of its work."""
        process = self.running.pop(sentinel)
        process.join()
        rank = self.ranks.index(process)
        if process.exitcode != 0 or not (self.scratch / f"result-{rank}.json").exists():
            raise self._failure(process)

    def send(self, number: int) -> None:
        """Hand a signal on to all that run."""
        self.told.append(number)
        for process in self.ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def end(self) -> None:
        """Leave nothing behind, of whatever they started either."""
        for process in self.ranks:
            if process.is_alive():
                process.kill()
        self._writer.close()
        for process in [*self.ranks, self._guard]:
            if process.pid is not None:
                process.join()
        self._scratch.cleanup()

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Hand the signals of FORWARDED on to the ranks; a second Ctrl-C ends them at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def forward(number: int, frame: Any) -> None:
            if number == signal.SIGINT and signal.SIGINT in self.told:
                raise KeyboardInterrupt
            self.send(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def results(self) -> list[Any]:
        found = [
            json.loads((self.scratch / f"result-{rank}.json").read_text())
            for rank in range(len(self.ranks))
        ]
        for one in found:
            if "interrupted" in one:
                raise Interrupted(one["interrupted"], one["code"])
        return [one["value"] for one in found]

    def _failure(self, process: Any) -> BaseException:
        """The first failure: a rank that ended without a word, by a signal or of itself (what the others then report
        is that they lost it), else the earliest traceback on disk."""
        time.sleep(0.2)  # let a rank that failed at the same moment write its own traceback
        reports = [json.loads(path.read_text()) for path in self.scratch.glob("failure-*.json")]
        reports.sort(key=lambda report: report["at"])
        for report in reports:
            if report["user_error"]:
                return UserError(report["message"])
        for rank in [process, *self.ranks]:
            if rank.exitcode is not None and rank.exitcode < 0:
                if -rank.exitcode in self.told:  # before the trainer was there to save
                    return Interrupted(f"{rank.name} was not training yet: nothing to save")
                name = signal.Signals(-rank.exitcode).name
                hints = {"SIGKILL": self._hint, "SIGALRM": lambda: " (it hung: see logs/hang.txt)"}
                hint = hints.get(name, str)()
                return RankFailed(f"{rank.name} was ended by {name}{hint}" + _in_turn(reports))
        told = {
            report["rank"] for report in reports
        }  # not empty, where no rank is left in this loop
        for number, rank in enumerate(self.ranks):
            if (
                rank.exitcode is not None
                and rank.name not in told
                and not (self.scratch / f"result-{number}.json").exists()
            ):
                what = f"{rank.name} ended with exit code {rank.exitcode} before its work was done"
                return RankFailed(what + _in_turn(reports))
        first, *others = reports
        if signal.SIGINT in self.told and first["traceback"].endswith("KeyboardInterrupt\n"):
            return KeyboardInterrupt()
        return RankFailed(f"{first['rank']} failed:\n{first['traceback']}{_in_turn(others)}")

    def _hint(self) -> str:
        now = _oom_kills()
        if now is None or self.killed_for_memory is None:
            return " (out of memory?)"
        if now > self.killed_for_memory:
            return " (out of memory: the kernel has killed a process for it meanwhile)"
        return " (not by the kernel for memory)"


def _in_turn(reports: list[dict[str, Any]]) -> str:
    """What failed after, and mostly because of, the first failure: one line each."""
    return "".join(
        f"\n{report['rank']} failed in turn: {report['message'].strip().partition(chr(10))[0]}"
        for report in reports
    )


def _oom_kills() -> int | None:
    """How many processes the kernel of this machine has killed for lack of memory; None where it does not tell."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _run_rank(
    rank: int,
    count: int,
    scratch: str,
    environ: dict[str, str],
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    die_with_parent()
    os.setpgid(0, 0)
    # a job that a shell has put in the background ignores it, but the launcher hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        DIST_TRAIN_RENDEZVOUS=str(Path(scratch) / "rendezvous"),
    )
    try:
        try:
            result = {"value": target(*arguments)}
        except Interrupted as error:
            result = {"interrupted": str(error), "code": error.code}
        _publish(Path(scratch) / f"result-{rank}.json", result)
    except BaseException as error:
        report = {
            "rank": f"rank-{rank}",
            "at": time.monotonic(),  # one clock for all processes of a machine, which nobody sets
            "user_error": isinstance(error, UserError),
            "message": f"{type(error).__name__}: {error}"
            if not isinstance(error, UserError)
            else str(error),
            "traceback": traceback.format_exc(),
        }
        _publish(Path(scratch) / f"failure-{rank}.json", report)
        sys.stdout.flush()
        os._exit(1)  # at once: the others may be waiting in a collective for us


def _publish(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)
