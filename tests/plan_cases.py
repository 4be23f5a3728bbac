"""Steps whose memory is measured, in this process and in two ranks; ranks import this file by name."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import cases
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dist_train import run
from dist_train.data import RunData
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.world import World, pin_threads

NOWHERE = RunDirectory(Path("nowhere"))


def large(model: str, data: Path | str, micro_batches: int, strategy: str) -> Recipe:
    """A tiny recipe made large enough that what it holds dominates."""
    recipe = cases.tiny_recipe(model, data, micro_batches=micro_batches, strategy=strategy)
    recipe = recipe.set("callbacks", {})
    if model == "transformer":
        return recipe.set("model.dropout", 0.0).set("model.dim", 256).set("model.depth", 6)
    if model == "resnet":
        return recipe.set("model.width", 32).set("model.depth", 20)
    return recipe.set("model.generator.width", 64).set("model.critic.width", 64)


class Read:
    """Batches that lie there already."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def from_(self, step: int, stop: int) -> Any:
        yield from self.batches[step:stop]


def measured_peak(recipe: Recipe, world: World, steps: int = 3) -> int:
    """Bytes that torch allocated at most, but for the batches, from before the trainer is built to the last step."""
    pin_threads(1, 1)
    batches = list(
        RunData(recipe, world).batches.from_(0, steps)
    )  # before we count: reading takes memory of the host
    gc.collect()  # what came before would be freed while we count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = run.build(recipe, world, NOWHERE)
        trainer.callbacks.by_name = {}
        gc.collect()  # weights from before DeepSpeed flattened them hang in cycles
        trainer.data = Read(batches)
        trainer.train(until=steps)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def measured_in_ranks(data: str, grid: list[list[Any]]) -> dict[str, int]:
    """The peak of rank 0 for each (model, micro-batches, strategy)."""
    world = World.join(group=True)
    found = {}
    for model, micro_batches, strategy in grid:
        recipe = large(model, data, micro_batches, strategy)
        found[f"{model}-{micro_batches}-{strategy}"] = measured_peak(recipe, world)
    world.leave()
    return found


class Undecided(nn.Module):
    """(B, 1, 8, 8) -> (B, 10), by a way that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        flat = image.flatten(1)
        return self.linear(flat) if flat.mean() > 0 else -self.linear(flat)
