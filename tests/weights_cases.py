"""What ranks do with starting weights. Ranks import this file by name."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from cases import strategy, tiny_recipe, trainer_of
from safetensors.torch import load_file

from dist_train import starting_weights
from dist_train.recipe import Recipe
from dist_train.trainer import Trainer
from dist_train.world import World, pin_threads

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3-persistent", "fsdp2")


def sources(folder: str) -> dict[str, dict[str, Any]]:
    """Every kind of source, all with the weights of one run (but for `average`)."""
    return {
        "run": {"from": f"{folder}/run"},
        "checkpoint": {"from": f"{folder}/run/checkpoints/step-00000003"},
        "average": {"from": f"{folder}/run", "averages": "ema"},
        "file": {"from": f"{folder}/plain.safetensors"},
        "folder": {"from": f"{folder}/export"},
        "parts": {"from": f"{folder}/parts"},
        "renamed": {
            "from": f"{folder}/renamed.safetensors",
            "rename": [
                {"from": "head.kernel", "to": "classifier.weight"},
                {"from": "trunk.*", "to": "*"},
            ],
        },
    }


def fine_tuned(data: str, weights: dict[str, Any], spread: str, **settings: Any) -> Recipe:
    spec = {"name": spread.partition("-")[0]} if spread == "zero3-persistent" else strategy(spread)
    frozen = [{"match": "stem.*", "frozen": True}]
    return tiny_recipe(
        "resnet",
        data,
        seed=99,
        strategy=spec,
        weights=weights,
        optimizer__groups=frozen,
        **settings,
    )


def loaded(trainer: Trainer, recipe: Recipe) -> dict[str, Any]:
    """The weights after loading, nothing of what was there before, and what every view of them gives."""
    engine = trainer.engines["model"]
    for full_name, part in engine.slices():
        if full_name.startswith(("weights/", "buffers/")):
            part.tensor.fill_(float("nan") if part.tensor.is_floating_point() else -1)
    starting_weights.load(recipe, trainer.engines, trainer.world, trainer.directory)
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    with torch.no_grad():
        views = [engine.frozen("model")(image), engine.evaluated("model")(image)]
    return {"weights": engine.full_weights(), "evaluated": views[1].tolist()}


def load_all(world: World, data: str, folder: str, spreads: tuple[str, ...]) -> dict[str, Any]:
    """{spread/source: [tensors that differ from the weights loaded by hand, the output in evaluation]}."""
    truth = load_file(f"{folder}/plain.safetensors")
    average = load_file(f"{folder}/average.safetensors")
    results: dict[str, Any] = {}
    for spread in spreads:
        place = Path(folder) / f"{spread}-{world.size}"
        every = {n: fine_tuned(data, weights, spread) for n, weights in sources(folder).items()}
        with trainer_of(every["run"], world, place) as trainer:
            for name, recipe in every.items():
                try:
                    found = loaded(trainer, recipe)
                except Exception:
                    results[f"{spread}/{name}"] = [traceback.format_exc(limit=-3), None]
                    continue
                expected = average if name == "average" else truth
                assert {f"model.{key}" for key in expected} == set(found["weights"])
                different = [
                    key
                    for key, tensor in expected.items()
                    if not torch.equal(found["weights"][f"model.{key}"], tensor)
                ]
                results[f"{spread}/{name}"] = [different, found["evaluated"]]
    return results


def two_ranks(data: str, folder: str) -> dict[str, Any]:
    world = World.join(group=True)
    pin_threads(1, 1)
    return load_all(world, data, folder, STRATEGIES)


def from_hub(data: str, folder: str) -> list[Any]:
    """Two loads in one process: from the cache, and of a model that is not in it."""
    found: list[Any] = []
    for name in ("hf://somebody/tiny", "hf://somebody/other"):
        try:
            recipe = fine_tuned(data, {"from": name}, "single")
            starting_weights.check(recipe)
            with trainer_of(recipe, World(), Path(folder) / f"hub-{len(found)}") as trainer:
                found.append(loaded(trainer, recipe)["evaluated"])
        except ValueError as error:
            found.append(str(error))
    return found
