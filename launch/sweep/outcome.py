"""How a leg of a trial ended, by what its run directory says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.launch.sweep.plan import Objective
from dist_train.run_directory import RunDirectory

NONFINITE = "/nonfinite"


@dataclass(frozen=True)
class Outcome:
    """`state` is done, diverged or failed; `value` is the objective, None but for what is done."""

    state: str
    value: float | None = None
    step: int = 0
    seconds: float = 0.0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Outcome:
        return cls(**{one.name: row[one.name] for one in dataclasses.fields(cls)})


def read_outcome(run_dir: Path, objective: Objective, error: str = "") -> Outcome:
    """What came of a leg: of one that ended well, or with an error."""
    rows = RunDirectory(run_dir).rows()
    last = rows[-1] if rows else {}
    step, seconds = last.get("step", 0), last.get("seconds", 0.0)
    figure = f"evaluate/{objective.metric}"
    broken = any(name.endswith(NONFINITE) for name in last)
    if error:
        return Outcome("diverged" if broken else "failed", None, step, seconds, error)
    found = [row for row in rows if figure in row]
    if not found:
        return Outcome("failed", None, step, seconds, f"{run_dir}: has no {figure}")
    if found[-1][figure] is None:
        what = found[-1][figure + NONFINITE]
        return Outcome("diverged", None, step, seconds, f"{figure} is {what} at the end")
    values = [row[figure] for row in found if row[figure] is not None]
    best = min(values, key=objective.loss)
    return Outcome("done", best if objective.at == "best" else values[-1], step, seconds)
