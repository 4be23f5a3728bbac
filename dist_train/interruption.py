"""A run that is told to end early: all ranks stop at the same place, save there, and leave.

A signal (SIGTERM, SIGUSR2, SIGINT) to any rank is enough, and its handler sets a flag. The interpreter writes its
number into a pipe at once, even while this rank waits in a collective; a thread reads it there and tells the
others through the store by which the ranks found each other. Each rank's thread then publishes how many places
(ends of steps) its rank has passed, and closes the gate behind it: the first that nobody has passed is where all stop.
So no rank waits for another that has stopped before it, and a step costs a lock, no collective and no host sync.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dist_train.world import COLLECTIVE_TIMEOUT, World

HEEDED = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
POLL = 0.25
"""Seconds after which a rank hears of a signal to another one."""
REQUEUE, INTERRUPTED = 75, 130

_numbers = itertools.count()  # of the interruptions of this process: the same on every rank


class Interruption:
    """Whether this run has been told to end, and where.

    Attributes:
        reason: what told it so, like "SIGTERM to rank 1"; "" before that. code: the exit code that goes with it.
    """

    def __init__(self, world: World) -> None:
        self.reason, self.code = "", REQUEUE
        self._world, self._store = world, world.store(f"interruption-{next(_numbers)}")
        self._noted = False
        self._gate = threading.Lock()
        self._closed = threading.Event()
        self._passed = 0
        self._last = 0
        self._decided = threading.Event()
        self._error: Exception | None = None
        self._reader, self._writer = -1, -1

    @contextmanager
    def heeded(self) -> Iterator[Interruption]:
        """Within it signals mean "save and end". In a thread other than the main one only those to other ranks do."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        is_main_thread = threading.current_thread() is threading.main_thread()
        if is_main_thread:
            before = {number: signal.signal(number, self._note) for number in HEEDED}
            wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, name="interruption", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            if is_main_thread:
                signal.set_wakeup_fd(wakeup)
                for number, handler in before.items():
                    signal.signal(number, handler)
            if self._store is not None:
                with suppress(Exception):  # the rank that held the store may be gone
                    self._publish()  # for those who still ask
            os.write(self._writer, b"\0")
            thread.join()
            os.close(self._writer)
            os.close(self._reader)

    def reached(self) -> bool:
        """Pass a place that every rank passes in the same order, or hear that all stop here."""
        if self._noted:
            self._closed.wait(COLLECTIVE_TIMEOUT.total_seconds())
        with self._gate:
            if not self._closed.is_set():
                self._passed += 1
                return False
        if not self._decided.wait(COLLECTIVE_TIMEOUT.total_seconds()) or self._error is not None:
            raise RuntimeError(
                f"told to end by {self.reason}, but not all ranks answer: {self._error}"
            )
        if self._passed < self._last:
            self._passed += 1
            return False
        return True

    def _note(self, number: int, frame: Any) -> None:
        """The handler: from now on this rank waits at the next place for the thread to close the gate."""
        self._noted = True

    # -- the listening thread ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        interrupts = 0
        while True:
            numbers = b""
            if select.select([self._reader], [], [], POLL)[0]:
                numbers = os.read(self._reader, 64)
            if 0 in numbers:
                return
            interrupts += numbers.count(signal.SIGINT)
            if interrupts > 1:
                os._exit(INTERRUPTED)  # asked twice: at once; what is on disk is whole at any time
            heard = [number for number in numbers if number in HEEDED]
            try:
                if heard and not self._closed.is_set():
                    name = signal.Signals(heard[0]).name
                    self._tell(f"{name} to rank {self._world.rank}")
                if (
                    not self._closed.is_set()
                    and self._store is not None
                    and self._store.check(["reason"])
                ):
                    self._close(self._store.get("reason").decode())
            except Exception as error:  # the ranks that held the store have left
                self._error = error
                self._closed.set()
                self._decided.set()
                return

    def _tell(self, reason: str) -> None:
        if self._store is None:
            self._close(reason)
        else:
            self._store.compare_set("reason", "", reason)

    def _close(self, reason: str) -> None:
        """Let this rank pass no place more before all know how far each has come."""
        self.reason = reason
        self.code = INTERRUPTED if reason.startswith("SIGINT") else REQUEUE
        with self._gate:
            self._closed.set()
        if self._store is None:
            self._last = self._passed
        else:
            self._publish()
            names = [f"passed-{rank}" for rank in range(self._world.size)]
            self._store.wait(names, COLLECTIVE_TIMEOUT)
            self._last = max(int(self._store.get(name)) for name in names)
        self._decided.set()

    def _publish(self) -> None:
        self._store.set(f"passed-{self._world.rank}", str(self._passed))
