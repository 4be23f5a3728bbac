"""What ranks do in test_ensembles.py. They import this file by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import torch
from torch import Tensor

from dist_train import assembly, checkpoint
from dist_train.recipe import Recipe
from dist_train.world import World, pin_threads

STEPS, START, CYCLE = 10, 4, 2
TAKEN = (4, 6, 8, 10)
SET = "72 samples"
"""Three batches of 24, over which statistics are taken."""


def swa_recipe(data: str, model: str = "resnet", **settings: Any) -> Recipe:
    """A short run that averages the weights after the steps TAKEN, with every step's checkpoint."""
    recipe = cases.tiny_recipe(model, data, duration=f"{STEPS} steps", **settings)
    swa = {"start": f"{START} steps", "cycle": f"{CYCLE} steps", "statistics": SET}
    schedule = {"name": "swa", "start": f"{START} steps", "end": 0.5}
    recipe = recipe.set("callbacks.ema", None).set("callbacks.swa", swa)
    recipe = recipe.set("callbacks.learning_rate_decay", {"schedule": schedule})
    return recipe.set("callbacks.checkpoint", {"every": "1 step", "keep": STEPS})


def averaged(recipe: Recipe, world: World, folder: Path) -> dict[str, Tensor]:
    """The averages of all players after the run, under NETWORK.NAME."""
    with cases.trainer_of(recipe, world, folder) as trainer:
        trainer.train()
        found = trainer.callback("swa").weights(trainer)
    return {name: tensor for whole in found.values() for name, tensor in whole.items()}


def strategies_in_ranks(names: list[str], data: str, folder: str) -> dict[str, Any]:
    """Of each strategy on these ranks: the largest difference of its averages, and of running statistics, from the mean
    of its own checkpoints, and from those of one process that rank 0 reads from disk."""
    from safetensors.torch import load_file

    world = World.join(group=True)
    pin_threads(1, 1)
    one = load_file(Path(folder) / "one.safetensors")
    found: dict[str, Any] = {}
    for name in names:
        recipe = swa_recipe(data, strategy=cases.strategy(name), micro_batches=4)
        place = Path(folder) / f"{name}-{world.size}"
        ours = averaged(recipe, world, place)
        hand = mean_of_checkpoints(place)
        found[name] = {
            "from_hand": apart(ours, hand),
            "from_one": apart(ours, {n: t for n, t in one.items() if n in hand}),
            "statistics": apart(ours, {n: t for n, t in one.items() if ".running_" in n}),
        }
    world.leave()
    return found


def mean_of_checkpoints(run_dir: Path, steps: tuple[int, ...] = TAKEN) -> dict[str, Tensor]:
    """The mean weights of some steps, in float64."""
    readers = [checkpoint.Reader(checkpoint.at(run_dir / "checkpoints", step)) for step in steps]
    return {
        name.removeprefix("weights/"): torch.stack([r.whole(name).double() for r in readers]).mean(
            0
        )
        for name in readers[0].names("weights/")
    }


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference over all tensors of `theirs`, each relative to its largest value."""
    assert theirs
    return max(
        float((ours[name].double() - tensor.double()).abs().max() / tensor.abs().max().clamp(1e-3))
        for name, tensor in theirs.items()
    )


def built(recipe: Recipe) -> Any:
    """Its network as it is at the start, by itself."""
    trainer = assembly.build_one(recipe.set("strategy", "single"))
    return trainer.engines["model"].player.networks["model"]
