"""One HTML file that says what a run's curves show: nothing to install, nothing to fetch, several runs side by side."""

from __future__ import annotations

import base64
import importlib.resources
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.diagnose.curves import diagnose
from dist_train.errors import UserError
from dist_train.pictures.charts import Line, line_chart
from dist_train.run_directory import RunDirectory, scrub, write_file
from dist_train.yaml_text import read_yaml

EVALUATE = "evaluate/"
BOOKKEEPING = ("step", "epoch", "samples", "seconds", "images", "captions")
RATES = {
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
    "tokens_per_second": "Tokens per second",
    "data_wait": "Share of time waiting for data",
    "memory_mb": "Memory (MB)",
}
FROM_ZERO = ("samples_per_second", "tokens_per_second", "data_wait", "memory_mb")
SMALLER_IS_BETTER = (
    *("loss", "nll", "perplexity", "bits", "error", "brier"),
    *("rmse", "mse", "mae", "l1", "distance", "fid"),
)
"""Words in the name of a metric."""
NEITHER_IS_BETTER = ("kl",)
GRIDS_SHOWN = 6


@dataclass
class RunRecord:
    """What a run directory tells: `rows` of metrics.jsonl, the recipe, the last start's environment."""

    name: str
    directory: RunDirectory
    rows: list[dict[str, Any]]
    recipe: dict[str, Any]
    environment: dict[str, Any]

    @classmethod
    def read(cls, path: Path | str) -> RunRecord:
        """Read a run directory; UserError when it is none or has no rows yet."""
        directory = RunDirectory.open(path)
        rows = directory.rows()
        if not rows:
            raise UserError(
                f"{directory.path}: has no row in metrics.jsonl yet, so there is nothing to report"
            )
        recipe = read_yaml(directory.recipe.read_bytes(), str(directory.recipe)) or {}
        found = {}
        if directory.environment.exists():
            found = json.loads(directory.environment.read_text(encoding="utf-8"))
        return cls(directory.path.resolve().name, directory, rows, scrub(recipe), found)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a figure, where it is a finite number."""
        return [
            (row["step"], float(row[name]))
            for row in self.rows
            if isinstance(row.get(name), int | float) and math.isfinite(row[name])
        ]

    def names(self) -> list[str]:
        """The figures in the rows, in order of appearance."""
        seen = dict.fromkeys(
            name
            for row in self.rows
            for name, value in row.items()
            if isinstance(value, int | float)
        )
        return [name for name in seen if name not in BOOKKEEPING]

    def losses(self) -> list[str]:
        """The training losses: one, or one a player."""
        return [
            n for n in self.names() if n.rpartition("/")[2] == "loss" and not n.startswith(EVALUATE)
        ]

    def best(self, name: str) -> tuple[float, float]:
        """(step, value) of the best of an evaluation's figure."""
        pick = min if self.smaller_is_better(name) else max
        return pick(self.curve(name), key=lambda point: point[1])

    def has_best(self, name: str) -> bool:
        """Whether more, or less, of an evaluation's figure is better."""
        return name.rpartition("/")[2] not in NEITHER_IS_BETTER

    def smaller_is_better(self, name: str) -> bool:
        """By the recipe for the metric it watches, by its name for others."""
        settings = self.recipe.get("evaluate") or {}
        if settings.get("best") == name.removeprefix(EVALUATE):
            return settings.get("mode") == "min"
        return not set(re.split("[_/]", name)).isdisjoint(SMALLER_IS_BETTER)


def write_report(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the report of one run, or of several side by side; returns its path.

    By default it is `report.html` in the (first) run's directory. Raises UserError for what is no run directory.
    """
    if not run_dirs:
        raise UserError("report: name at least one run directory")
    runs = [RunRecord.read(path) for path in run_dirs]
    path = Path(out) if out is not None else runs[0].directory.path / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, render(runs).encode())
    return path


def render(runs: Sequence[RunRecord]) -> str:
    """The report as HTML."""
    return page(
        "dist_train",
        "report.html.jinja",
        title=runs[0].recipe.get("name", runs[0].name) if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_described(run) for run in runs],
        figures=_figures(runs),
        charts=_charts(runs),
    )


def page(package: str, template: str, **values: Any) -> str:
    """A template of a package as HTML, in the style of all reports; values are text, not markup."""
    from jinja2 import Environment, StrictUndefined

    files = importlib.resources.files
    made = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files(package).joinpath(template).read_text("utf-8")
    style = files("dist_train").joinpath("report.css").read_text("utf-8")
    return made.from_string(text).render(style=style, **values)


# --------------------------------------------------------------------------------------------------------------------
# What the curves show, in words


def verdict(run: RunRecord) -> list[str]:
    """Sentences on the run's curves: falling, flat or diverged; the best evaluation; what is wrong and its remedy;
    what held it up."""
    losses = run.losses()
    findings = diagnose(run.rows)
    said = [_loss_verdict(run, name) for name in losses]
    if len(losses) > 1:
        said.append(
            "Losses of players that work against each other need not fall: judge by the samples."
        )
    elif not findings and said and said[0].endswith("falling at the end."):
        said.append("A longer run may gain more.")
    for name in run.names():
        if name.startswith(EVALUATE) and run.curve(name):
            said.append(_evaluation_verdict(run, name))
    said += map(str, findings)
    said += _clipping(run)
    waits = [share for _, share in run.curve("data_wait")]
    if waits and statistics.mean(waits) > 0.1:
        said.append(f"{statistics.mean(waits):.0%} of the time went into waiting for data.")
    return said


def _clipping(run: RunRecord) -> list[str]:
    """What `clip_gradients: {suggest: true}` found."""
    said = []
    for name in run.names():
        player, slash, figure = name.rpartition("/")
        if figure != "suggested_norm":
            continue
        whose = f" of the {player}" if player else ""
        bound = _number(run.curve(name)[-1][1])
        text = f"Clipping the gradient norm{whose} at {bound} would act on one step in 20"
        acted = run.curve(f"{player}{slash}share_clipped")
        if acted:
            text += f"; the present bound acted on {acted[-1][1]:.0%} of them"
        said.append(f"{text}.")
    return said


def _loss_verdict(run: RunRecord, name: str) -> str:
    bad = [row for row in run.rows if f"{name}/nonfinite" in row]
    if bad:
        what, step = bad[0][f"{name}/nonfinite"], bad[0]["step"]
        return f"The {_words(name)} diverged: it was {what} at step {step:,}."
    values = [value for _, value in run.curve(name)]
    first, last = _end(values, 0), _end(values, -1)
    start = f"The {_words(name)} went from {_number(first)} to {_number(last)}"
    if len(values) < 8:
        return f"{start}; {len(values)} rows are too few to say more."
    quarter = values[-max(4, len(values) // 4) :]
    half = len(quarter) // 2
    before, after = statistics.mean(quarter[:half]), statistics.mean(quarter[half:])
    noise = (
        2
        * (statistics.pstdev(quarter[:half]) + statistics.pstdev(quarter[half:]))
        / math.sqrt(half)
    )
    scale = max(abs(first - last), 1e-12)
    if abs(after - before) <= max(noise, 0.01 * scale):
        return f"{start} and is flat over the last quarter."
    if after < before:
        return f"{start} and is still falling at the end."
    return f"{start} and is rising over the last quarter."


def _evaluation_verdict(run: RunRecord, name: str) -> str:
    curve, plain = run.curve(name), name.removeprefix(EVALUATE)
    if len(curve) == 1 or not run.has_best(name):
        step, value = curve[-1]
        return f"Evaluation {plain}: {_number(value)} at step {step:,.0f}."
    step, value = run.best(name)
    last = (
        " (the last evaluation)"
        if step == curve[-1][0]
        else f"; it ended at {_number(curve[-1][1])}"
    )
    return f"Evaluation {plain}: best {_number(value)} at step {step:,.0f}{last}."


def _end(values: Sequence[float], side: int) -> float:
    """The mean of the first (side 0) or last (side -1) twentieth of the values."""
    count = max(1, len(values) // 20)
    return statistics.mean(values[:count] if side == 0 else values[-count:])


# --------------------------------------------------------------------------------------------------------------------
# The parts of the page


def _described(run: RunRecord) -> dict[str, Any]:
    return {
        "name": run.name,
        "path": str(run.directory.path),
        "verdict": verdict(run),
        "recipe": list(_flat(run.recipe)),
        "environment": list(_flat(_worth_telling(run.environment))),
        "confusion": next((r["confusion"] for r in run.rows[::-1] if "confusion" in r), None),
        "checkpoints": _checkpoints(run),
        "samples": _sample_grids(run),
        "plots": _plots(run),
    }


def _figures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The table at the top: each run's length and time, last losses, best and last evaluations."""
    losses = list(dict.fromkeys(name for run in runs for name in run.losses()))
    metrics = list(dict.fromkeys(n for run in runs for n in run.names() if n.startswith(EVALUATE)))
    lines = []
    for run in runs:
        last = run.rows[-1]
        speeds = [value for _, value in run.curve("samples_per_second")]
        cells = [f"{last['step']:,}", _number(last.get("epoch")), _clock(last.get("seconds"))]
        cells.append(_number(statistics.median(speeds)) if speeds else "-")
        for name in losses:
            curve = run.curve(name)
            cells.append(_number(_end([value for _, value in curve], -1)) if curve else "-")
        for name in metrics:
            curve = run.curve(name)
            if curve and not run.has_best(name):
                cells.append(_number(curve[-1][1]))
            elif curve:
                step, value = run.best(name)
                cells.append(f"{_number(curve[-1][1])} (best {_number(value)} at {step:,.0f})")
            else:
                cells.append("-")
        lines.append({"name": run.name, "cells": cells})
    heads = ["steps", "epochs", "time", "samples/s", *map(_words, [*losses, *metrics])]
    return {"heads": heads, "lines": lines}


def _charts(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    names = list(dict.fromkeys(name for run in runs for name in run.names()))
    training = [name for run in runs for name in run.losses()]
    losses = [n for n in names if n in training or n == f"{EVALUATE}loss"]
    ends = {rate: [n for n in names if n.rpartition("/")[2] == rate] for rate in RATES}
    ranks = [n for n in names if "effective_rank/" in n]
    taken = {*losses, *ranks, *(n for group in ends.values() for n in group)}
    others = [n for n in names if n not in taken]
    wanted: list[tuple[str, list[str]]] = [("Loss", losses)]
    wanted += [(_title(n), [n]) for n in others if n.startswith(EVALUATE)]
    wanted += [(title, ends[rate]) for rate, title in RATES.items()]
    wanted += [("Effective rank", ranks)]
    wanted += [(_title(n), [n]) for n in others if not n.startswith(EVALUATE)]
    charts = []
    for title, group in wanted:
        lines = []
        for number, run in enumerate(runs):
            for place, name in enumerate(group):
                parts = [run.name] * (len(runs) > 1) + [_words(name)] * (len(group) > 1)
                colour, dashed = (number, place > 0) if len(runs) > 1 else (place, False)
                lines.append(Line(" ".join(parts), run.curve(name), colour, dashed))
        if any(line.points for line in lines):
            from_zero = group[0] in FROM_ZERO
            charts.append({"title": title, "svg": line_chart(lines, from_zero=from_zero)})
    return charts


def _title(name: str) -> str:
    return _words(name)[:1].upper() + _words(name)[1:]


def _words(name: str) -> str:
    return name.replace("/", " ").replace("_", " ")


def _sample_grids(run: RunRecord) -> list[dict[str, Any]]:
    """Each named image over time: first, last, and some between, embedded."""
    by_name: dict[str, list[tuple[int, Path]]] = {}
    for row in run.rows:
        for name, path in (row.get("images") or {}).items():
            file = (run.directory.path / path).resolve()
            if file.is_file() and file.is_relative_to(run.directory.path.resolve()):
                by_name.setdefault(name, []).append((row["step"], file))
    grids = []
    for name, files in by_name.items():
        shown = sorted(
            {round(i * (len(files) - 1) / max(1, GRIDS_SHOWN - 1)) for i in range(GRIDS_SHOWN)}
        )
        pictures = [
            {
                "step": f"{files[i][0]:,}",
                "data": _embedded(files[i][1]),
            }
            for i in shown
            if i < len(files)
        ]
        grids.append({"name": name, "pictures": pictures})
    return grids


def _plots(run: RunRecord) -> list[dict[str, str]]:
    """What callbacks and diagnoses drew into `plots/`: the newest of each kind, embedded."""
    newest: dict[str, Path] = {}
    for file in sorted(run.directory.plots.glob("*.png")):
        newest[re.sub(r"-\d{8}$", "", file.stem)] = file
    return [
        {"name": _words(kind.replace("-", " ")), "file": file.name, "data": _embedded(file)}
        for kind, file in newest.items()
    ]


def _embedded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _checkpoints(run: RunRecord) -> list[dict[str, str]]:
    found = []
    for folder in sorted(run.directory.checkpoints.glob("step-*")):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        step = folder.name.removeprefix("step-")
        if step.isdigit():
            found.append({"name": folder.name, "step": f"{int(step):,}", "size": _bytes(size)})
    return found


def _worth_telling(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment without the diff, which is in environment.json, and earlier starts as a number."""
    told = {name: value for name, value in environment.items() if name != "earlier"}
    git = told.get("git")
    if git:
        told["git"] = f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}"
    told["starts"] = 1 + len(environment.get("earlier", []))
    return told if environment else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A tree of settings as (dotted name, value) pairs; empty ones are left out."""
    pairs: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.") or [(f"{prefix}{name}", "on")]
        elif value is not None and value != []:
            pairs.append(
                (f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else str(value))
            )
    return pairs


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
