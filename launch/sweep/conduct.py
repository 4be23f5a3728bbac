"""A sweep in progress: what begins next, what came of it, and what is left on disk of both.

SWEEP/sweep.yaml        what it is                     SWEEP/sweep.jsonl    what happened: the truth
SWEEP/trials/0007-.../  a run directory a trial        SWEEP/best.yaml      the best trial's recipe
SWEEP/report.html       what it shows                  SWEEP/environment.json, SWEEP/code/
"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import checkpoint
from dist_train.amendments import amend, link_tree
from dist_train.errors import Interrupted, UserError
from dist_train.interruption import HEEDED, INTERRUPTED, REQUEUE
from dist_train.launch.sweep.journal import Journal
from dist_train.launch.sweep.outcome import Outcome, read_outcome
from dist_train.launch.sweep.plan import Plan
from dist_train.launch.sweep.progress import Progress
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file
from dist_train.search import Leg, best

LOG = "logs/job.log"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A leg that is to be trained: its run directory is there, and `until` says where it pauses."""

    leg: Leg
    run_dir: Path
    recipe: Recipe
    until: str | None


@dataclass(frozen=True)
class End:
    """A task that has ended: well, or with an error; or cut off, so that it counts for nothing yet."""

    task: Task
    error: str = ""
    cut_off: bool = False


class Place(ABC):
    """Where the trials of a sweep are trained. Final subclasses stand in files of their own."""

    @property
    @abstractmethod
    def tasks(self) -> list[Task]:
        """Those that have begun and not ended."""

    @abstractmethod
    def start(self, task: Task) -> None:
        """Begin a task, or take it up again where an earlier start of the sweep has left it."""

    @abstractmethod
    def ended(self) -> list[End]:
        """Wait for some to end, or a moment; they leave `tasks`."""

    @abstractmethod
    def stop(self, number: int) -> None:
        """Let all tasks save and end, because of a signal of this number. Safe in a signal handler."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


class Sweep:
    """What begins next, and what came of what has begun.

    Attributes:
        stopping: why nothing more begins, or "".
    """

    def __init__(self, plan: Plan, path: Path, threads: int | None = None) -> None:
        self.plan, self.path, self.threads = plan, path, threads
        self.journal = Journal(path, plan.objective)
        self.journal.open()
        self.cut_off = [trial.legs[-1] for trial in self.journal.trials if trial.running]
        """What an earlier start has begun and not ended: it goes on first."""
        self.failures = 0
        self.stopping = ""

    def next(self) -> Task | None:
        """What to begin now; None while nothing can be begun before something ends, and at the end."""
        while not self.stopping and (leg := self._next_leg()) is not None:
            try:
                return self._prepared(leg)
            except UserError as error:  # settings that do not fit together
                log.warning("trial %d: failed: %s", leg.trial, error)
                self._note(leg.trial, Outcome("failed", error=str(error)))
        return None

    def ended(self, end: End) -> Outcome:
        """Write down what came of a task."""
        outcome = read_outcome(end.task.run_dir, self.plan.objective, end.error)
        if self.plan.search.exchanges and outcome.state == "done":
            self._keep(end.task)
        self._note(end.task.leg.trial, outcome)
        return outcome

    def _next_leg(self) -> Leg | None:
        if self.cut_off:
            return self.cut_off.pop(0)
        leg = self.plan.search.ask(self.journal.trials)
        if leg is not None:
            self.journal.begun(leg, self._run(leg))
        return leg

    def _note(self, number: int, outcome: Outcome) -> None:
        self.journal.ended(number, outcome)
        if outcome.state == "failed":
            self.failures += 1
            if self.failures > self.plan.max_failures:
                self.stopping = (
                    f"{self.failures} trials failed, expected at most max_failures"
                    f" {self.plan.max_failures}; the last: {outcome.error}"
                )
        if best(self.journal.trials) == number:
            recipe = self.plan.recipe_of(self.journal.trials[number].legs[-1])
            write_file(self.path / "best.yaml", recipe.to_yaml().encode())

    def best(self) -> dict[str, Any] | None:
        """The best trial so far."""
        number = best(self.journal.trials)
        if number is None:
            return None
        trial, outcome = self.journal.trials[number], self.journal.outcomes[number]
        assert outcome is not None
        return {
            "trial": number,
            self.plan.objective.metric: outcome.value,
            "values": dict(trial.values),
            "run_dir": str(self.path / self.journal.runs[number]),
        }

    def _run(self, leg: Leg) -> str:
        """The folder of a trial, named by what it begins with."""
        if leg.trial < len(self.journal.runs):
            return self.journal.runs[leg.trial]
        words = [f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in leg.values.items()]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))[:60].strip("-._")
        return f"trials/{leg.trial:04d}-{name}"

    def _prepared(self, leg: Leg) -> Task:
        """The run directory of a leg, as it has to be when it begins."""
        number = leg.trial
        run_dir = self.path / self.journal.runs[number]
        recipe = self.plan.recipe_of(leg)
        if self.threads is not None and recipe.threads == "auto":
            recipe = recipe.set("threads", self.threads)
        for instance, spec in recipe.callback_specs.items():
            if spec["name"] == "wandb" and "group" not in spec:
                recipe = recipe.set(f"callbacks.{instance}.group", self.path.name)
        if not (run_dir / "recipe.yaml").is_file():
            shutil.rmtree(run_dir, ignore_errors=True)  # a start that was killed while it made it
            RunDirectory.create_at(run_dir)
            write_file(run_dir / "recipe.yaml", recipe.to_yaml().encode())
        self._amend(leg, run_dir)
        return Task(leg, run_dir, recipe, self.plan.until(leg))

    def _amend(self, leg: Leg, run_dir: Path) -> None:
        """Change a run that goes on with other settings, or from another's checkpoint."""
        legs = self.journal.trials[leg.trial].legs
        index = len(legs) - 1
        before = legs[index - 1].values if index else leg.values
        if leg.donor is None and before == leg.values:
            return
        taken = None
        if leg.donor is not None:
            taken = self._kept(leg.donor, index - 1)
        gone = {
            key: _get(self.plan.recipe.as_dict(), key) for key in before.keys() - leg.values.keys()
        }
        changes = gone | {k: v for k, v in leg.values.items() if before.get(k, _get) != v}
        reason = f"generation {index}: goes on from trial {leg.donor}"
        amend(run_dir, changes, taken=taken, reason=reason)

    def _keep(self, task: Task) -> None:
        """A second name for the checkpoint that a leg ended with: others may need it when its own run has dropped it.
        Those of the generation before the last are needed by nobody any more."""
        number = task.leg.trial
        index = len(self.journal.trials[number].legs) - 1
        folder = task.run_dir / "legs" / f"{index:02d}"
        path, _ = checkpoint.last_good(task.run_dir / "checkpoints")
        if path is not None and not folder.exists():
            scratch = folder.with_name(f".{folder.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            link_tree(path, scratch / path.name)
            scratch.rename(folder)
        shutil.rmtree(task.run_dir / "legs" / f"{index - 2:02d}", ignore_errors=True)

    def _kept(self, number: int, index: int) -> Path:
        folder = self.path / self.journal.runs[number] / "legs" / f"{index:02d}"
        return next(iter(folder.glob(f"{checkpoint.PREFIX}*")))


def conduct(sweep: Sweep, place: Place, at_once: int, progress: Progress) -> None:
    """Run a sweep to its end. Raises Interrupted when a signal ends it early: all trials save and leave first."""
    with heeded(place.stop) as told:
        try:
            while True:
                while not told and len(place.tasks) < at_once and (task := sweep.next()):
                    progress.began(task)
                    place.start(task)
                    if told:  # too late for the handler to find it
                        place.stop(told[0])
                if not place.tasks:
                    break
                for end in place.ended():
                    if not end.cut_off:
                        progress.ended(end.task, sweep.ended(end))
                if sweep.stopping and not told:
                    place.stop(signal.SIGTERM)
                    told.append(0)
        finally:
            place.close()
    raise_if_told(told, sweep)


def raise_if_told(told: Sequence[int], sweep: Sweep) -> None:
    """Raise Interrupted if one of these signals ended the sweep (0 is none: its failures did)."""
    numbers = [number for number in told if number]
    if numbers:
        name = signal.Signals(numbers[0]).name
        raise Interrupted(
            f"{name}: {len(sweep.journal.trials)} trials begun, go on with:"
            f" dist-train sweep {sweep.path} --resume",
            INTERRUPTED if numbers[0] == signal.SIGINT else REQUEUE,
        )


@contextmanager
def heeded(stop: Any) -> Iterator[list[int]]:
    """Within it a signal is noted in the list that this gives, and handed to `stop`; a second Ctrl-C ends at once."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in told:
            raise KeyboardInterrupt
        told.append(number)
        stop(number)

    before = {number: signal.signal(number, note) for number in HEEDED}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _word(value: Any) -> str:
    """A value as a part of a name."""
    if isinstance(value, dict):
        return str(value.get("name", "-".join(value)))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _get(settings: Any, key: str) -> Any:
    """The value at a dotted key of mappings; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings
