"""A window of steps, operation by operation: a trace for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import torch

from dist_train.callbacks import Callback
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.trainer import Trainer


class Profiler(Callback):
    """Write `profile/rank-N-step-S.json.gz` of the steps [start, start + steps), and on a GPU what its memory held.

    Args:
        steps: how many. start: the first one, counted from 0; by default the fourth, after the first ones' set-up. A
            run that resumes later than that begins with the step after its first.
        ranks: which ranks write; rank 0 alone by default.
        shapes: whether each operation tells the shapes of its inputs. stacks: whether it tells its line of Python.
    """

    priority = 1

    def __init__(
        self,
        steps: int = 10,
        start: int = 3,
        ranks: list[int] | None = None,
        shapes: bool = False,
        stacks: bool = False,
    ) -> None:
        if steps < 1 or start < 0:
            raise UserError(f"profiler: got steps {steps} from {start}, expected 1 or more, from 0")
        self.steps, self.start, self.ranks = steps, start, [0] if ranks is None else ranks
        self.shapes, self.stacks = shapes, stacks
        self._running: torch.profiler.profile | None = None

    def run_begins(self, run: Trainer) -> None:
        first = run.step + 1 if run.step > self.start else self.start
        self._window = (
            range(first, first + self.steps) if run.world.rank in self.ranks else range(0)
        )
        self._folder = run.directory.path / "profile"

    def step_begins(self, run: Trainer) -> None:
        if run.step not in self._window or self._running is not None:
            return
        cuda = run.world.device.startswith("cuda")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._running = torch.profiler.profile(
            activities=activities,
            record_shapes=self.shapes,
            with_stack=self.stacks,
            profile_memory=True,
        )
        self._running.start()

    def step_ends(self, run: Trainer) -> None:
        if self._running is not None and (run.step == self._window.stop or run.is_last):
            self._write(run, self._running)

    def failed(self, run: Trainer, error: BaseException) -> None:
        if self._running is not None:  # what led to the failure is in it
            self._write(run, self._running)

    def _write(self, run: Trainer, running: torch.profiler.profile) -> None:
        self._running = None
        running.stop()
        self._folder.mkdir(exist_ok=True)
        name = f"rank-{run.world.rank}-step-{self._window.start}"
        running.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        if run.world.device.startswith("cuda"):
            held: Any = torch.cuda.memory._snapshot()
            torch.cuda.memory._record_memory_history(enabled=None)
            (self._folder / f"{name}-memory.json").write_text(json.dumps(held, default=str))
        logging.getLogger("dist_train").info("profile: %s", self._folder / f"{name}.json.gz")
