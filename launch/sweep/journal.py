"""`sweep.jsonl`: the truth of a sweep. Rows are added and never changed: a leg has begun, a leg has ended."""

from __future__ import annotations

import json
import math
import os
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

from dist_train.errors import UserError
from dist_train.launch.sweep.outcome import Outcome
from dist_train.launch.sweep.plan import Objective
from dist_train.search import Leg, Trial

FILE = "sweep.jsonl"


class Journal:
    """The rows of a sweep, on disk before anything is done about them.

    Attributes:
        trials: what a search is told, in order of their numbers.
        runs: the folder of each trial, relative to the sweep's.
        outcomes: how each trial's last leg that has ended did, None before there is one.
        rows: all of them.
    """

    def __init__(self, path: Path, objective: Objective) -> None:
        self.objective = objective
        self.trials: list[Trial] = []
        self.runs: list[str] = []
        self.outcomes: list[Outcome | None] = []
        self.rows: list[dict[str, Any]] = []
        self._path = path / FILE
        self._file = -1
        content = self._path.read_bytes() if self._path.is_file() else b""
        self._whole = content.rfind(b"\n") + 1  # without a last row that a kill tore
        for number, line in enumerate(content[: self._whole].splitlines(), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, IndexError, TypeError):
                raise UserError(f"{path / FILE}:{number}: not a row of a sweep") from None

    def open(self) -> None:
        """Be the one that writes it."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, self._whole)

    def begun(self, leg: Leg, run: str) -> None:
        """A leg is about to begin."""
        index = len(self.trials[leg.trial].legs) if leg.trial < len(self.trials) else 0
        self._write(
            {
                "event": "begun",
                "trial": leg.trial,
                "leg": index,
                "run": run,
                "values": dict(leg.values),
                "share": str(leg.share),
                "shortened": leg.shortened,
                "donor": leg.donor,
            }
        )

    def ended(self, trial: int, outcome: Outcome) -> None:
        """The last leg of a trial has ended."""
        leg = len(self.trials[trial].legs) - 1
        self._write({"event": "ended", "trial": trial, "leg": leg, **outcome.as_dict()})

    def close(self) -> None:
        os.close(self._file)

    def _write(self, row: dict[str, Any]) -> None:
        row["at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        os.write(self._file, (json.dumps(row, allow_nan=False) + "\n").encode())
        os.fsync(self._file)
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        number = row["trial"]
        if row["event"] == "begun":
            leg = Leg(number, row["values"], Fraction(row["share"]), row["shortened"], row["donor"])
            if number == len(self.trials):
                self.trials.append(Trial((), ()))
                self.runs.append(row["run"])
                self.outcomes.append(None)
            old = self.trials[number]
            self.trials[number] = Trial((*old.legs, leg), (*old.losses, None))
        else:
            outcome = Outcome.from_dict(row)
            old = self.trials[number]
            loss = math.inf if outcome.value is None else self.objective.loss(outcome.value)
            self.trials[number] = Trial(old.legs, (*old.losses[:-1], loss))
            self.outcomes[number] = outcome
        self.rows.append(row)
