"""`diagnose learning-rate`: one short run whose rate rises, and the rate that it suggests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.run import RUNS, train
from dist_train.run_directory import RunDirectory

KEPT = ("clip_gradients", "schedule", "console")
"""Callbacks that belong to the training itself; all others have no part in a sweep."""


def sweep_rate(
    recipe: Recipe | str | Path,
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 200,
    run_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Train the recipe once while its learning rate rises from `low` to `high`; return the rate to try.

    The run directory holds `learning-rate.json` and `plots/learning-rate.png`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if steps < 20:
        raise UserError(f"steps: got {steps}, expected 20 or more")
    kept = {k: v for k, v in recipe.callback_specs.items() if v["name"] in KEPT}
    sweep = {"name": "dist_train.callbacks.rate_sweep:RateSweep", "low": low, "high": high}
    changed = (
        recipe.set("duration", f"{steps} steps")
        .set("evaluate", None)
        .set("callbacks", {**kept, "rate_sweep": sweep})
        .set("name", f"{recipe.name[:50]}-rates")
    )
    place = Path(run_dir or RunDirectory.fresh(RUNS, recipe.project, changed.name))
    try:
        train(changed, run_dir=place)
    except RuntimeError:  # gradients that are not finite: the end of a sweep, if it got so far
        if not (place / "learning-rate.json").exists():
            raise
    found = json.loads((place / "learning-rate.json").read_text())
    return {
        "suggested": found["suggested"],
        "broke": found["broke"] or f"not up to {high:g}",
        "plot": str(place / "plots" / "learning-rate.png"),
        "run_dir": str(place),
    }
