"""What a sweep is: a recipe, a space, a search, an objective, a seed. `sweep.yaml` in its directory holds all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train import components
from dist_train.duration import Duration
from dist_train.errors import UserError, nearest
from dist_train.recipe import Recipe
from dist_train.run_directory import write_file
from dist_train.search import Leg, Search, at_least
from dist_train.search.space import Space, read_space
from dist_train.settings import short
from dist_train.yaml_text import read_yaml, write_yaml

FILE = "sweep.yaml"
KEYS = ("search", "objective", "seed", "max_failures", "space")
STATES = ("best", "end")


@dataclass(frozen=True)
class Objective:
    """Which figure of `evaluate` counts, whether it is to be small or large, and when: the best so far, or the last."""

    metric: str
    mode: str
    at: str

    def loss(self, value: float) -> float:
        """The figure turned so that less is better."""
        return value if self.mode == "min" else -value


@dataclass(frozen=True)
class Plan:
    """A checked sweep. `settings` is what the file of the space says, with what it leaves open filled in."""

    recipe: Recipe
    settings: Mapping[str, Any]
    space: Space
    search: Search
    objective: Objective

    @property
    def max_failures(self) -> int:
        return self.settings["max_failures"]

    def recipe_of(self, leg: Leg) -> Recipe:
        """The recipe of a trial."""
        recipe = self.recipe
        for key, value in leg.values.items():
            recipe = recipe.set(key, value)
        if leg.shortened:
            recipe = recipe.set("duration", part_of(recipe.duration, leg))
        return recipe

    def until(self, leg: Leg) -> str | None:
        """Where a leg pauses; None at the end of its run."""
        whole = leg.shortened or leg.share == 1
        return None if whole else part_of(self.recipe_of(leg).duration, leg)

    def corners(self) -> list[Recipe]:
        """Recipes that together have every extreme of the space, structure checked. Raises UserError."""
        return [self.recipe_of(Leg(0, values)) for values in self.space.corners()]

    def write(self, path: Path) -> None:
        """Write it down in the sweep's directory."""
        record = {
            **self.settings,
            "source": self.recipe.source,
            "project_root": str(self.recipe.root),
            "recipe": self.recipe.as_dict(),
        }
        write_file(path / FILE, write_yaml(record).encode())


def part_of(duration: str, leg: Leg) -> str:
    """The share of a duration that a leg reaches: whole steps, or a fraction of epochs."""
    whole = Duration.parse(duration)
    amount = whole.amount * leg.share
    if whole.unit != "epochs":
        amount = type(amount)(math.ceil(amount))
    return str(Duration(amount, whole.unit, whole.player))


def make_plan(recipe: Recipe, settings: Any, where: str) -> Plan:
    """A sweep from the settings of its file; raises UserError that names `where`."""
    if not isinstance(settings, dict):
        raise UserError(f"{where}: got {short(settings)}, expected a mapping with search and space")
    for key in settings:
        if key not in KEYS:
            raise UserError(
                f"{where}: {key}: unknown key{nearest(key, KEYS)} (expected some of {', '.join(KEYS)})"
            )
    for key in ("search", "space"):
        if key not in settings:
            raise UserError(f"{where}: {key}: missing, expected {_EXAMPLES[key]}")
    seed = at_least(f"{where}: seed", settings.get("seed", 0), 0)
    failures = at_least(f"{where}: max_failures", settings.get("max_failures", 10), 0)
    space = read_space(settings["space"], f"{where}: space")
    spec = settings["search"]
    spec = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict):
        raise UserError(f"{where}: search: got {short(spec)}, expected {_EXAMPLES['search']}")
    search = components.build("search", spec, f"{where}: search", space=space, seed=seed)
    objective = _objective(recipe, settings.get("objective", {}), f"{where}: objective")
    saving = [one for one in recipe.callback_specs.values() if one["name"] == "checkpoint"]
    if search.pauses and not saving:
        raise UserError(
            f"{where}: search: {spec['name']} goes on from checkpoints, but {recipe.source} saves none:"
            " expected callbacks.checkpoint in it"
        )
    resolved = {
        "search": spec,
        "objective": {"metric": objective.metric, "mode": objective.mode, "at": objective.at},
        "seed": seed,
        "max_failures": failures,
        "space": settings["space"],
    }
    return Plan(recipe, resolved, space, search, objective)


_EXAMPLES = {
    "search": "a mapping like {name: random, trials: 20}",
    "space": "a mapping like {optimizer.learning_rate: {log_uniform: [1e-4, 1e-1]}}",
}


def read_plan(path: Path) -> Plan:
    """The sweep of a directory; UserError where there is none."""
    file = path / FILE
    if not file.is_file():
        raise UserError(f"{path}: is no sweep (it has no {FILE})")
    record = read_yaml(file.read_bytes(), str(file))
    recipe = Recipe.restore(record["recipe"], record["source"], Path(record["project_root"]))
    return make_plan(recipe, {key: record[key] for key in KEYS}, str(file))


def read_settings(file: Path) -> Any:
    """What a file of a space says."""
    try:
        return read_yaml(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"--space {file}: cannot be read: {error.strerror}") from None


def _objective(recipe: Recipe, spec: Any, where: str) -> Objective:
    if recipe.evaluate is None:
        raise UserError(
            f"{recipe.source}: evaluate: missing, expected the figure that a sweep is about"
        )
    if not isinstance(spec, dict) or spec.keys() - {"metric", "mode", "at"}:
        raise UserError(f"{where}: got {short(spec)}, expected a mapping of metric, mode and at")
    section = recipe.evaluate
    figures = [*section.metrics, *(f"{s}/{m}" for s in section.sets for m in section.metrics)]
    metric = spec.get("metric", section.best)
    if metric not in figures:
        raise UserError(
            f"{where}.metric: got {short(metric)}, expected one of {', '.join(figures)}"
            + nearest(str(metric), figures)
        )
    mode = spec.get("mode", section.mode if metric == section.best else None)
    if mode not in ("min", "max"):
        raise UserError(f"{where}.mode: got {short(mode)}, expected min or max")
    at = spec.get("at", "best")
    if at not in STATES:
        raise UserError(f"{where}.at: got {short(at)}, expected best (so far) or end")
    return Objective(metric, mode, at)
