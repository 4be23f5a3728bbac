"""Members that differ by their seed: whole runs of one recipe, shared out over the ranks, combined by a collective."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dist_train import components, run, trained
from dist_train.data import data_folders
from dist_train.errors import UserError
from dist_train.objectives import Objective
from dist_train.ranks import start_ranks
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory, write_file
from dist_train.trained.ensemble import Member, collect, judge
from dist_train.trainer import Trainer
from dist_train.world import World

RESULT = "ensemble.json"
PATIENCE = timedelta(days=7)
"""How long ranks that are done wait for the members of others."""


def train_seeds(
    recipe: Recipe,
    seeds: int,
    *,
    run_dir: str | Path | None = None,
    resume: str | None = None,
    ranks: int | None = None,
) -> dict[str, Any]:
    """Train `seeds` runs of a recipe, with its seed and those after it, and judge them together.

    Each member is a run of one process, bit for bit the one that `--set seed=S` trains alone, in `RUN_DIR/seed-S`. With
    ranks (of ours or a launcher's) each takes its share of them; they meet when all are trained. The figures are
    in `RUN_DIR/ensemble.json`. Give the recipe `data.resample: bootstrap` and each member draws its own training set.
    """
    _check(recipe, seeds)
    if resume not in (None, "auto"):
        raise UserError(f"--resume {resume}: with --seeds expected auto, beside --run-dir")
    if resume is not None and run_dir is None:
        raise UserError("--resume auto: needs --run-dir, the directory to look in")
    folder = Path(run_dir or RunDirectory.fresh(run.RUNS, recipe.project, f"{recipe.name}-seeds"))
    if resume is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already: give another --run-dir, or --resume auto")
    data_folders(recipe)  # packed by this process, not by the members
    plain = (recipe.as_dict(), recipe.source, recipe.root)
    if ranks is not None:
        return start_ranks(ranks, _train_share, plain, str(folder), seeds, resume)[0]
    return _train_share(plain, str(folder), seeds, resume)


def _check(recipe: Recipe, seeds: int) -> None:
    recipe.check_components()
    if seeds < 2:
        raise UserError(f"--seeds: got {seeds}, expected 2 or more")
    if recipe.evaluate is None:
        raise UserError("--seeds: the recipe has no evaluate section, so no split to judge on")
    names = {strategy["name"] for strategy in recipe.strategies.values()}
    if names - {"single", "ddp"}:
        raise UserError(
            f"strategy: got {', '.join(sorted(names))} with --seeds, expected single or ddp: a member is one process"
        )
    objective = components.build("objective", recipe.objective, "objective", root=recipe.root)
    if type(objective).combine is Objective.combine:
        raise UserError(f"--seeds: objective '{recipe.objective['name']}' combines no members")


def _train_share(
    plain: tuple[dict[str, Any], str, Path], folder: str, seeds: int, resume: str | None
) -> dict[str, Any]:
    """This rank's members, one after the other, then all together (collective)."""
    recipe = Recipe.restore(*plain)
    recipe.importable()
    world = World.join(timeout=PATIENCE, devices=recipe.devices)
    folder = world.agree(folder)  # a launcher's ranks have each made up a name
    if seeds < world.size:
        raise UserError(
            f"--seeds: got {seeds}, expected one or more for each of {world.size} ranks"
        )
    silent = {k: v for k, v in recipe.callback_specs.items() if v["name"] != "console"}
    recipe = recipe.set("callbacks", silent)
    numbers = range(world.rank, seeds, world.size)
    directories = {n: Path(folder) / f"seed-{recipe.seed + n}" for n in range(seeds)}
    for number in numbers:
        member = recipe.set("seed", recipe.seed + number)
        run.train(member, run_dir=directories[number], resume=resume, alone=True)
    result = _together(recipe, world, {n: directories[n] for n in numbers}, directories)
    if world.is_main:
        write_file(Path(folder) / RESULT, json.dumps(result, indent=2).encode())
    return {"run_dir": str(folder), **result}


def _together(
    recipe: Recipe, world: World, own: Mapping[int, Path], directories: Mapping[int, Path]
) -> dict[str, Any]:
    """Judge all members on the recipe's split: each rank asks those that it trained, and the sum brings the others."""
    assert recipe.evaluate is not None
    outputs: dict[str, torch.Tensor] = {}
    trainer: Trainer | None = None
    for number, directory in own.items():
        trainer = trained.restore(directory, world=World.alone(devices=recipe.devices))
        (found,), rows = collect(trainer, trainer.evaluation, recipe.evaluate.weights)
        for name, tensor in found.items():
            shape = (len(directories), *tensor.shape)
            outputs.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))[number] = tensor
    assert trainer is not None
    summed = {name: world.sum_(all_.to(world.device)).cpu() for name, all_ in outputs.items()}
    members = [
        Member(directory.name, {name: all_[number] for name, all_ in summed.items()})
        for number, directory in directories.items()
    ]
    return judge(trainer.objective, members, rows)
