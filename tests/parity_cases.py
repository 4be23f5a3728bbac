"""The parity grid: which cases there are, their references by one process, and what ranks find. Ranks import this."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import Doubled, strategy
from parity_models import CLIPS, FAMILIES, family_recipe

from dist_train.verify import parity
from dist_train.world import World

STEPS = 5
BOUND = 1e-6
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
FACTORS = (tuple(FAMILIES), STRATEGIES, (1, 2, 4), (1, 3), tuple(CLIPS))
"""Model, strategy, ranks, accumulation, clipping."""
Case = tuple[str, str, int, int, str]
GRID: list[Case] = list(itertools.product(*FACTORS))


def pairwise() -> list[Case]:
    """Few cases in which each two values of two factors meet: the one with most new pairs, again and again."""
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(FACTORS)), 2)
        for a in FACTORS[i]
        for b in FACTORS[j]
    }
    chosen: list[Case] = []
    while missing:
        best = max(GRID, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def reference_name(case: Case) -> str:
    model, _, ranks, accumulation, clip = case
    return f"{model}-{ranks * accumulation}-{clip}"


def references(cases: list[Case], data: str, folder: str) -> None:
    """What one process computes, for each number of micro-batches and clipping that the cases need."""
    for name, case in {reference_name(case): case for case in cases}.items():
        recipe = family_recipe(case[0], data, case[2] * case[3], case[4])
        with parity.trainer_of(recipe, World(), Path(folder) / name) as trainer:
            parity.write_reference(trainer, STEPS)


def grid(cases: list[Case], data: str, folder: str) -> dict[str, dict[str, float]]:
    """Of each case in this world the largest difference by kind: loss, gradient, state (weights, moments, buffers,
    memory)."""
    world = World.join(group=True)
    found = {}
    for case in cases:
        model, name, ranks, accumulation, clip = case
        recipe = family_recipe(model, data, ranks * accumulation, clip)
        recipe = recipe.set("strategy", strategy(name))
        where = "-".join(map(str, case))
        with parity.trainer_of(recipe, world, Path(folder) / where) as trainer:
            differences = parity.step_locked(trainer, Path(folder) / reference_name(case), STEPS)
        worst: dict[str, float] = {}
        for full, (difference, _) in differences.items():
            kind = full.split("/")[1]
            worst[kind] = max(worst.get(kind, 0.0), difference)
        found[where] = worst
    world.leave()
    return found


def losses(precision: str, strategies: list[str], data: str) -> dict[str, list[float]]:
    """The losses of STEPS free steps of every family in this world, by family and strategy."""
    world = World.join(group=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family, name in itertools.product(FAMILIES, strategies):
            recipe = family_recipe(family, data, 4, "norm").set("strategy", strategy(name))
            if precision == "float64":
                torch.set_default_dtype(torch.float64)
            else:
                recipe = recipe.set("precision", precision)
            directory = Path(world.agree(folder)) / f"{family}-{name}"
            with parity.trainer_of(recipe, world, directory) as trainer:
                if precision == "float64":
                    trainer.data = Doubled(trainer.data)
                kept = parity.Losses()
                parity.watch(trainer, kept)
                trainer.train()
            found[f"{family}-{name}"] = kept.losses
        world.barrier()
    world.leave()
    return found
