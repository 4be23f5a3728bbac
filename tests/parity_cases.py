"""The parity grid: which cases there are, their references by one process, and what ranks find. Ranks import this."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases import Doubled, strategy
from parity_models import CLIPS, FAMILIES, family_recipe

from dist_train.callbacks import Callback
from dist_train.networks.precision import has_recurrent_bf16
from dist_train.testing import spawn_ranks
from dist_train.trainer import Trainer
from dist_train.verify import parity, verdict
from dist_train.world import World

STEPS = 5
BOUND = 1e-6
TIMES_FLOOR = 3.0
"""What is beyond the bound may be so many times its own floor."""
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
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


def case_name(case: Case) -> str:
    return "-".join(map(str, case))


def references(cases: list[Case], data: str, folder: str) -> None:
    """What one process computes, for each number of micro-batches and clipping that the cases need."""
    for name, case in {reference_name(case): case for case in cases}.items():
        recipe = family_recipe(case[0], data, case[2] * case[3], case[4])
        with parity.trainer_of(recipe, World(), Path(folder) / name) as trainer:
            parity.write_reference(trainer, STEPS)


def grid(cases: list[Case], data: str, folder: str) -> dict[str, dict[str, Any]]:
    """Of each case in this world the `worst` difference by kind (loss, gradient, state: weights, moments, buffers,
    memory), and every one `beyond` the bound by its name."""
    world = World.join(group=True)
    found = {}
    for case in cases:
        model, name, ranks, accumulation, clip = case
        recipe = family_recipe(model, data, ranks * accumulation, clip)
        recipe = recipe.set("strategy", strategy(name))
        with parity.trainer_of(recipe, world, Path(folder) / case_name(case)) as trainer:
            differences = parity.step_locked(trainer, Path(folder) / reference_name(case), STEPS)
        worst: dict[str, float] = {}
        for full, (difference, _) in differences.items():
            kind = full.split("/")[1]
            worst[kind] = max(worst.get(kind, 0.0), difference)
        beyond = {full: d for full, (d, _) in differences.items() if not d <= BOUND}
        found[case_name(case)] = {"worst": worst, "beyond": beyond}
    world.leave()
    return found


class StoredAnew(Callback):
    """Half of all weights, drawn by a seed, become the next number above or below at the start of a step.

    At best, what a step computes in fp32 is the exact result of weights about so far off (Higham 2002, section 1.5), so
    this moves all that is rounded on its way forward and backward, as Monte Carlo arithmetic does (Parker 1997).
    """

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step_begins(self, run: Trainer) -> None:
        for engine in run.engines.values():
            for weight in engine.trained.values():
                draw = torch.randint(0, 4, weight.shape, generator=self._random)
                toward = weight + (draw == 0).to(weight) - (draw == 1).to(weight)
                weight.copy_(torch.nextafter(weight, toward))


def floors(cases: list[Case], data: str, folder: str) -> dict[str, dict[str, float]]:
    """By name of the reference what one process shows against itself: of every entry the largest of eight runs, its
    micro-batches summed forward and in reverse, weights and gradients moved by half a rounding, by eight seeds."""
    found: dict[str, dict[str, float]] = {}
    for name, case in {reference_name(case): case for case in cases}.items():
        recipe = family_recipe(case[0], data, case[2] * case[3], case[4])
        found[name] = {}
        for seed, order in enumerate(("forward", "reversed") * 4):
            directory = Path(folder) / f"{name}-floor-{seed}"
            with parity.trainer_of(recipe, World(), directory, order) as trainer:
                parity.watch(trainer, parity.Rounded(seed))
                parity.watch(trainer, StoredAnew(seed))
                differences = parity.step_locked(trainer, Path(folder) / name, STEPS)
            for full, (difference, _) in differences.items():
                found[name][full] = max(found[name].get(full, 0.0), difference)
    return found


def failures(
    grid: dict[str, dict[str, Any]], data: str, folder: str
) -> dict[str, dict[str, list[float]]]:
    """Of each case that has anything beyond the bound: {entry: [difference, its floor]}, measured now."""
    beyond = [case for case in GRID if grid.get(case_name(case), {}).get("beyond")]
    floor = spawn_ranks(1, floors, beyond, data, folder, timeout=3600)[0] if beyond else {}
    return {
        case_name(case): {
            full: [difference, floor[reference_name(case)].get(full, 0.0)]
            for full, difference in grid[case_name(case)]["beyond"].items()
        }
        for case in beyond
    }


def within(difference: float, floor: float) -> bool:
    """Whether a difference beyond the bound is rounding of what is itself ill-conditioned."""
    return difference <= TIMES_FLOOR * min(floor, verdict.CEILING)


def losses(precision: str, strategies: list[str], data: str) -> dict[str, list[float]]:
    """The losses of STEPS free steps of every family in this world, by family and strategy."""
    world = World.join(group=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family, name in itertools.product(FAMILIES, strategies):
            if (precision, family) == ("bf16", "LSTM") and not has_recurrent_bf16():
                continue
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
