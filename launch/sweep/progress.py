"""What a person sees of a sweep: a line each trial, and a bar on a terminal, on the standard error stream."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from dist_train.settings import short

if TYPE_CHECKING:
    from dist_train.launch.sweep.conduct import Sweep, Task
    from dist_train.launch.sweep.outcome import Outcome


class Progress:
    """`with Progress(sweep) as progress`: then it hears of each task that has begun or ended."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._screen = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._screen,
            transient=True,
            disable=not self._screen.is_terminal,
        )
        done = sum(loss is not None for trial in sweep.journal.trials for loss in trial.losses)
        self._task = self._bar.add_task("sweep", total=sweep.plan.search.legs(), completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def began(self, task: Task) -> None:
        pause = f" to {task.until}" if task.until else ""
        donor = "" if task.leg.donor is None else f" from trial {task.leg.donor}"
        self._say(f"trial {task.leg.trial} begins{donor}{pause}: {described(task.leg.values)}")

    def ended(self, task: Task, outcome: Outcome) -> None:
        metric, number = self.sweep.plan.objective.metric, task.leg.trial
        if outcome.state == "done":
            told = f"{metric} {outcome.value:.6g} at step {outcome.step}"
        else:
            told = f"{outcome.state}: {outcome.error.strip().splitlines()[-1]}"
        best = self.sweep.best()
        known = f" (best {best[metric]:.6g}, trial {best['trial']})" if best else ""
        self._say(f"trial {number}: {told}{known}")
        self._bar.advance(self._task)

    def _say(self, line: str) -> None:
        self._screen.print(line, markup=False)


def described(values: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(
        f"{key}={f'{value:.4g}' if isinstance(value, float) else short(value)}"
        for key, value in values.items()
    )
