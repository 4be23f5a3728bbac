"""What a sweep would begin with: `sweep --dry-run`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from dist_train.launch.spec import Spec
from dist_train.launch.sweep.journal import Journal
from dist_train.launch.sweep.plan import Plan
from dist_train.search import Trial

SHOWN = 10


def preview(plan: Plan, path: Path, spec: Spec, at_once: int) -> dict[str, Any]:
    """The legs that would begin before any other has ended, or go on where a sweep is taken up again: at most SHOWN,
    and no more than run side by side where the search heeds the order in which they end. Nothing is started or written.

    Returns `{"sweep", "on", "ranks", "at_once", "legs", "first": [{"trial", "values", "duration", "until"}]}`: `ranks`
    are those of each trial, `legs` about how many the search asks for in all.
    """
    trials = Journal(path, plan.objective).trials
    legs = [trial.legs[-1] for trial in trials if trial.running]
    most = SHOWN if plan.search.ordered else min(SHOWN, at_once)
    while len(legs) < most and (leg := plan.search.ask(trials)) is not None:
        if leg.trial == len(trials):
            trials.append(Trial((), ()))
        old = trials[leg.trial]
        trials[leg.trial] = Trial((*old.legs, leg), (*old.losses, None))
        legs.append(leg)
    first = [
        {
            "trial": leg.trial,
            "values": dict(leg.values),
            "duration": plan.recipe_of(leg).duration,
            "until": plan.until(leg),
        }
        for leg in legs
    ]
    return {
        "sweep": str(path),
        "on": spec.on,
        "ranks": spec.ranks,
        "at_once": at_once,
        "legs": plan.search.legs(),
        "first": first,
    }


def show(found: Mapping[str, Any]) -> None:
    """Each trial as the settings that `train` would take."""
    typer.echo(
        f"{found['sweep']}: about {found['legs']} legs in all, {found['at_once']} at once, on {found['on']},"
        f" ranks of each: {found['ranks']}. First:"
    )
    for leg in found["first"]:
        words = [
            f"--set {shlex.quote(f'{key}={json.dumps(value)}')}"
            for key, value in leg["values"].items()
        ]
        until = f"--until {shlex.quote(leg['until'])}" if leg["until"] else ""
        typer.echo(" ".join([f"{leg['trial']:4}", *words, until]).rstrip())
    typer.echo("nothing was started")
