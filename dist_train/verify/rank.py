"""What the ranks that `verify` starts do: the reference, every strategy, and a run that is killed and brought back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from dist_train import faults
from dist_train.errors import UserError
from dist_train.recipe import Recipe
from dist_train.verify import parity
from dist_train.world import World

Plain = tuple[dict[str, Any], str, Path]
"""A recipe as it travels to new processes: settings, source, root."""


def reference(plain: Plain, folder: str, steps: int) -> dict[str, Any]:
    """One process, all micro-batches accumulated: its states, how far it is from itself when it does the same again
    (`repeat`), and when it only rounds otherwise (`floor`)."""
    recipe, world, here = _restored(plain).set("strategy", "single"), World.join(), Path(folder)
    with parity.trainer_of(recipe, world, here / "reference") as trainer:
        steps = min(steps, trainer.total_steps)
        losses = parity.write_reference(trainer, steps)
        steps = trainer.step
    with parity.trainer_of(recipe, world, here / "repeat") as trainer:
        repeat = parity.step_locked(trainer, here / "reference", steps, backwards=True)
    with parity.trainer_of(recipe, world, here / "floor", "reversed") as trainer:
        parity.watch(trainer, parity.Rounded())
        floor = parity.free_running(trainer, here / "reference", steps, losses)
        floor |= parity.step_locked(trainer, here / "reference", steps)
    with parity.trainer_of(recipe, world, here / "operations") as trainer:
        operations = parity.nondeterministic_operations(lambda: trainer.train(until=1))
    return {
        "steps": steps,
        "losses": losses,
        "repeat": repeat,
        "floor": floor,
        "nondeterministic": operations,
        "device": world.device,
    }


def strategies(
    plain: Plain, folder: str, steps: int, losses: list[float], chosen: dict[str, Any]
) -> dict[str, Any]:
    """In this world: the differences from the reference under each strategy, or why one is refused."""
    recipe, world, here = _restored(plain), World.join(group=True), Path(folder)
    found: dict[str, Any] = {}
    for name, strategy in chosen.items():
        try:
            with parity.trainer_of(recipe.set("strategy", strategy), world, here / name) as trainer:
                free = parity.free_running(trainer, here / "reference", steps, losses)
                locked = parity.step_locked(trainer, here / "reference", steps)
            found[name] = {"differences": free | locked}
        except UserError as error:
            found[name] = {"refused": str(error)}
        gc.collect()  # an engine is full of cycles, and the next one needs its memory
    world.leave()
    return found


def train(plain: Plain, runs: list[tuple[str, Any, str, str | None]], steps: int) -> None:
    """Train in this world to step `steps`, once for each (directory, strategy, fault, resume)."""
    recipe, world = _restored(plain), World.join(group=True)
    for directory, strategy, fault, resume in runs:
        faults.plan(fault)
        recipe = recipe.set("strategy", strategy)
        with parity.trainer_of(recipe, world, Path(directory), resume=resume) as trainer:
            trainer.train(until=steps)
    world.leave()


def _restored(plain: Plain) -> Recipe:
    recipe = Recipe.restore(*plain)
    recipe.importable()
    return recipe
