"""Where a rank is: its step and phase, in a small shared file that another process can read when this one hangs.

A beat is one write to mapped memory, without a system call: about a microsecond.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train import watch
from dist_train.watch import PHASES, RECORD, STACKS

_INDEX = {phase: index for index, phase in enumerate(PHASES)}


class Heartbeat:
    """The beats of this rank; within `watched`, where a watcher process reads them.

    Attributes:
        spent: seconds in each phase so far.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since, self._step, self._beats = "start", time.perf_counter(), 0, 0
        self._record: bytearray | mmap.mmap = bytearray(RECORD.size)

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins, or goes on; of step `step` (counted from 1, as rows are), where that is another."""
        now = time.perf_counter()
        self.spent[self._phase] += now - self._since
        self._phase, self._since = phase, now
        if step is not None:
            self._step = step
        self._beats += 1
        RECORD.pack_into(self._record, 0, self._step, _INDEX[phase], self._beats)

    @contextmanager
    def watched(self, directory: Path, rank: int, size: int, hang_after: float) -> Iterator[None]:
        """Let a process of its own watch over this rank, that ends it when it stands still for `hang_after` seconds."""
        file = directory / "watch" / f"rank-{rank}"
        file.write_bytes(RECORD.pack(0, 0, 0))
        place = {"directory": str(directory), "rank": rank, "size": size, "hang_after": hang_after}
        with (
            (directory / "logs" / f"stacks-{rank}.txt").open("w") as stacks,
            file.open("r+b") as opened,
            mmap.mmap(opened.fileno(), RECORD.size) as self._record,
            subprocess.Popen(
                [sys.executable, "-I", "-S", watch.__file__, json.dumps(place)],
                stdin=subprocess.PIPE,  # a line in it, or its end, is the end of the watch
                stdout=subprocess.DEVNULL,
            ) as watcher,
        ):
            faulthandler.register(STACKS, file=stacks, all_threads=True)
            try:
                yield
            finally:
                self.enter("end")
                faulthandler.unregister(STACKS)
                self._record = bytearray(self._record[:])
                watcher.communicate(
                    b"end"
                )  # closing would not do: loader workers hold copies of the pipe


def clear(directory: Path) -> None:
    """Forget what the watchers of an earlier start have left."""
    shutil.rmtree(directory / "watch", ignore_errors=True)
    (directory / "watch").mkdir()
