"""`report.html` of a sweep: its trials, the best first, and what the settings did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dist_train.launch.sweep.journal import Journal
from dist_train.launch.sweep.outcome import Outcome
from dist_train.launch.sweep.plan import Plan
from dist_train.launch.sweep.progress import described
from dist_train.pictures.charts import Line, line_chart
from dist_train.pictures.settings_charts import Labels, parallel, scatter
from dist_train.report import page
from dist_train.run_directory import write_file
from dist_train.search import Trial, best
from dist_train.search.bayesian import importance
from dist_train.search.space import Choice, Dimension

MOST_LABELS = 6


def write_report(plan: Plan, path: Path, out: Path | None = None) -> Path:
    """Write the report of a sweep, finished or not, by default into its directory; returns its path."""
    journal = Journal(path, plan.objective)
    file = out or path / "report.html"
    write_file(file, render(plan, path, journal).encode())
    return file


def render(plan: Plan, path: Path, journal: Journal) -> str:
    """The report as HTML."""
    trials, number = journal.trials, best(journal.trials)
    ended = [n for n, trial in enumerate(trials) if math.isfinite(trial.loss)]
    ended.sort(key=lambda n: (-trials[n].reached, trials[n].loss))
    others = [n for n in range(len(trials)) if n not in ended]
    shares = importance(plan.space, [trial for trial in trials if not trial.running])
    return page(
        "dist_train.launch.sweep",
        "report.html.jinja",
        title=path.name,
        path=str(path),
        metric=plan.objective.metric,
        verdict=_verdict(plan, journal, number),
        keys=list(plan.space.dimensions),
        trials=[_row(plan, journal, n) for n in [*ended, *others]],
        charts=_charts(plan, journal, ended, number) if ended else [],
        importance=[(key, f"{share:.0%}") for key, share in shares.items()],
        settings=[(key, str(value)) for key, value in plan.settings.items() if key != "space"],
        space=[(key, str(spec)) for key, spec in plan.settings["space"].items()],
    )


def _verdict(plan: Plan, journal: Journal, number: int | None) -> list[str]:
    """Sentences: what is best, how many failed, what the search cannot know."""
    outcomes = [outcome for outcome in journal.outcomes if outcome is not None]
    metric = plan.objective.metric
    if number is None:
        said = ["No trial has ended well."]
    else:
        outcome = journal.outcomes[number]
        assert outcome is not None and outcome.value is not None
        said = [
            f"Trial {number} is the best of those trained the longest: {metric} {outcome.value:.5g}"
            f" with {described(journal.trials[number].values)}."
        ]
        if len(journal.trials[number].legs) > 1 and plan.search.exchanges:
            said.append("Its settings changed on the way: amendments.jsonl has the schedule.")
        said += _at_edges(plan, journal.trials[number])
    for state in ("failed", "diverged"):
        count = sum(outcome.state == state for outcome in outcomes)
        if count:
            said.append(f"{count} of {len(journal.trials)} trials {state}.")
    running = sum(trial.running for trial in journal.trials)
    if running:
        said.append(f"{running} have not ended.")
    said.append(
        "The figure of the best of many is too good by chance: report that of data that chose nothing."
    )
    return said


def _at_edges(plan: Plan, trial: Trial) -> list[str]:
    """Which ranges may have to be wider."""
    near = [
        key
        for key, value in trial.values.items()
        if not isinstance(plan.space.dimensions[key], Choice)
        and min(place := plan.space.dimensions[key].place(value), 1 - place) < 0.05
    ]
    return [f"The best is at the edge of {', '.join(near)}: search further there."] if near else []


def _row(plan: Plan, journal: Journal, number: int) -> dict[str, Any]:
    trial, outcome = journal.trials[number], journal.outcomes[number]
    outcome = outcome or Outcome("running")
    return {
        "number": number,
        "run": journal.runs[number],
        "value": "-" if outcome.value is None else f"{outcome.value:.5g}",
        "state": "running" if trial.running else outcome.state,
        "reached": f"{float(trial.reached):.0%}",
        "step": f"{outcome.step:,}",
        "seconds": f"{outcome.seconds:,.1f}",
        "values": [_value(trial.values.get(key)) for key in plan.space.dimensions],
        "error": outcome.error.strip().splitlines()[-1] if outcome.error else "",
    }


def _charts(
    plan: Plan, journal: Journal, ended: list[int], number: int | None
) -> list[dict[str, str]]:
    trials, metric = journal.trials, plan.objective.metric
    sign = 1 if plan.objective.mode == "min" else -1
    curve, least = [], math.inf
    ends = [row for row in journal.rows if row["event"] == "ended"]
    for count, row in enumerate(ends, start=1):
        if row["value"] is not None:
            least = min(least, plan.objective.loss(row["value"]))
        if math.isfinite(least):
            curve.append((float(count), sign * least))
    found = [
        {
            "title": f"Best {metric} so far",
            "svg": line_chart([Line("best so far", curve)], x_label="legs"),
        }
    ]
    losses = [trials[n].loss for n in ended]
    low, high = min(losses), max(losses)
    axes, columns = [], []
    for key, dimension in plan.space.dimensions.items():
        there = [n for n in ended if key in trials[n].values]
        if not there:
            continue
        labels = _labels(dimension)
        places = {n: dimension.place(trials[n].values[key]) for n in there}
        points = [(places[n], sign * trials[n].loss) for n in there]
        chosen = there.index(number) if number in there else -1
        svg = scatter(points, chosen, labels, key)
        found.append({"title": f"{metric} by {key}", "svg": svg})
        axes.append((key.rpartition(".")[2], labels))
        columns.append([places.get(n) for n in ended])
    goodness = [(high - loss) / (high - low) if high > low else 1.0 for loss in losses]
    ends_of = [(0.0, f"{sign * high:.4g}"), (1.0, f"{sign * low:.4g}")]
    lines = [list(line) for line in zip(*columns, goodness, strict=True)]
    chosen = ended.index(number) if number in ended else -1
    svg = parallel(lines, chosen, [*axes, (metric, ends_of)])
    return [found[0], {"title": "All settings", "svg": svg}, *found[1:]]


def _labels(dimension: Dimension) -> Labels:
    if isinstance(dimension, Choice):
        values = dimension.values[:MOST_LABELS]
        return [(dimension.place(value), _value(value)) for value in values]
    return [(place, _value(dimension.at(place))) for place in (0.0, 0.5, 1.0)]


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return str(value.get("name", value))
    return str(value)
