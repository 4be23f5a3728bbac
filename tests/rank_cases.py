"""What ranks do in the tests of supervision and interruption. Ranks import this file by name."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from dist_train import faults, run
from dist_train.callbacks import Callback
from dist_train.errors import Interrupted
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.world import World

planned: tuple[int, str, int, int] | None = None
"""The signal that is next: its number, the hook and step (-1: any) to send it in, and the rank (-1: each) that does, to
itself."""


class Signal(Callback):
    """Sends the planned signal, once."""

    def _send(self, hook: str, run: Any) -> None:
        global planned
        if planned is None:
            return
        if (
            hook == planned[1]
            and planned[2] in (run.step, -1)
            and planned[3] in (run.world.rank, -1)
        ):
            number, planned = planned[0], None
            os.kill(os.getpid(), number)

    def run_begins(self, run: Any) -> None:
        self._send("run_begins", run)

    def step_begins(self, run: Any) -> None:
        self._send("step_begins", run)

    def gradients_ready(self, run: Any, turn: Any) -> None:
        self._send("gradients_ready", run)

    def step_ends(self, run: Any) -> None:
        self._send("step_ends", run)

    def evaluation_batch(self, run: Any, outputs: Any, micro: Any) -> None:
        self._send("evaluation_batch", run)


class Failing(Callback):
    """Fails in a step: always, or only in the first start of the run (`once`)."""

    def __init__(self, step: int, once: bool) -> None:
        self.step, self.once = step, once

    def step_begins(self, run: Any) -> None:
        mark = run.directory.path / "failed-before"
        if run.step == self.step and run.world.rank == 1 and not (self.once and mark.exists()):
            mark.touch()
            raise ValueError("planted")


def interrupted(
    cases: list[tuple[dict[str, Any], str, list[tuple[int, str, int, int]]]],
) -> list[Any]:
    """Train each (settings, folder, signals) with one interruption after another; what each start ended with, and the
    step of the last row."""
    global planned
    ends = []
    for settings, folder, signals in cases:
        told: list[Any] = []
        for one in [*signals, None]:
            planned = one
            try:
                run.train(Recipe(**settings), run_dir=folder, resume="auto")
                end = [0, ""]
            except Interrupted as error:
                end = [error.code, str(error)]
            rows = RunDirectory(Path(folder)).rows()
            told.append([*end, rows[-1]["step"] if rows else 0])
        ends.append(told)
    return ends


def faulty(
    settings: dict[str, Any], folder: str, told: tuple[int, str, int, int] | None, fault: str
) -> None:
    """Train with a signal that tells the run to end, and a fault (`faults`) at a later point."""
    global planned
    planned = told
    faults.plan(fault)
    run.train(Recipe(**settings), run_dir=folder, resume="auto")


def end_badly(how: str, rank: int) -> str:
    """One rank ends in a way that a supervisor must not take for success; the others wait for it."""
    world = World.join()
    if world.rank == rank:
        if how == "os._exit(0)":
            os._exit(0)
        elif how == "sys.exit(0)":
            sys.exit(0)
        elif how == "abort":
            os.abort()
        elif how == "segfault":
            ctypes.string_at(1)
    world.barrier()
    return "never"
