"""A network of which no rank has room for the whole, and what ranks do with it. Ranks import this file by name."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import checkpoint
from dist_train.objectives import Objective, Turn
from dist_train.recipe import Recipe
from dist_train.verify import parity
from dist_train.verify.parity import trainer_of
from dist_train.world import World, pin_threads

WIDTH, DEPTH = 768, 28
WEIGHTS = 4 * DEPTH * WIDTH * WIDTH
"""Bytes of the layers' weights, 63 MiB."""
LIMIT = int(0.9 * WEIGHTS)
"""What a rank may take beyond what it has when it starts."""
M_MMAP_THRESHOLD = -3


class Deep(nn.Module):
    """(B, 1, 8, 8) -> (B, 10): `depth` residual layers of `width`^2 weights, all initialised at the end."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.1 / width)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image.flatten(1))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def recipe(data: str, strategy: str, width: int = WIDTH, depth: int = DEPTH) -> Recipe:
    """Plain SGD: of 4 bytes a weight its copy for the update, and its gradient, and small buckets."""
    spread: Any = strategy
    if strategy == "zero3":
        few = {"reduce_bucket_size": 500_000, "sub_group_size": 1_000_000}
        spread = {"name": "zero3", "deepspeed": {"zero_optimization": few}}
    return Recipe(
        seed=3,
        duration="2 steps",
        threads=1,
        strategy=spread,
        data={"path": f"{data}/digits", "global_batch": 8, "micro_batch": 1},
        model={"name": "large_cases:Deep", "width": width, "depth": depth},
        objective={"name": "classification"},
        optimizer={"name": "sgd", "learning_rate": 0.01},
        evaluate={"split": "test", "every": "2 steps", "metrics": ["loss"], "micro_batch": 8},
        callbacks={},
    )


class Painter(nn.Module):
    """Noise (B, 16) -> image (B, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 64)

    def forward(self, noise: Tensor) -> Tensor:
        return torch.tanh(self.layer(noise)).view(-1, 1, 8, 8)


class Adversaries(Objective):
    """A small generator, whose turn goes through a large critic; the critic's own gradients are streamed."""

    players = ("generator", "critic")

    def turns(self, step: int) -> list[Turn]:
        return [Turn("critic", 0), Turn("generator", 1)]

    def loss(self, turn: Turn, networks: Any, micro: Any, scalars: Any) -> Any:
        real = micro["image"]
        noise = torch.randn(len(real), 16, device=real.device)
        if turn.player == "generator":
            return F.softplus(-networks.critic(networks.generator(noise))).mean(), {}
        with torch.no_grad():
            fake = networks.generator(noise)
        real, fake = networks.critic(torch.cat([real, fake])).chunk(
            2
        )  # one forward: layer by layer
        return F.softplus(-real).mean() + F.softplus(fake).mean(), {}


ROOM_FOR_TWO = int(1.6 * WEIGHTS)
"""Of 4 ranks: slices of the critic's weights, of their copy for the update and of its gradients are 3/4 of a copy."""


def adversaries(data: str, view_elements: int, width: int = WIDTH, depth: int = DEPTH) -> Recipe:
    few = {"reduce_bucket_size": 500_000, "sub_group_size": 1_000_000}
    base = recipe(data, "single", width, depth).as_dict()
    return Recipe(
        **base
        | {
            "strategy": {
                "name": "zero3",
                "view_elements": view_elements,
                "deepspeed": {"zero_optimization": few},
            },
            "model": {"generator": {"name": "large_cases:Painter"}, "critic": base["model"]},
            "objective": {"name": "large_cases:Adversaries"},
            "evaluate": None,
        }
    )


def adversaries_limited(data: str, folder: str, view_elements: int) -> dict[str, Any]:
    """Two steps with room for less than two copies of the critic."""
    world = limited_world(lambda world: _adversaries(data, folder, 0, world, 8, 2), ROOM_FOR_TWO)
    found = _adversaries(data, folder, view_elements, world)
    world.leave()
    return found


def _adversaries(
    data: str, folder: str, view_elements: int, world: World, *size: int
) -> dict[str, Any]:
    here = Path(folder) / f"{view_elements}-{len(size)}"
    with trainer_of(adversaries(data, view_elements, *size), world, here) as trainer:
        kept = parity.Losses()
        parity.watch(trainer, kept)
        trainer.train()
        return {"losses": kept.losses}


def two_steps(recipe: Recipe, world: World, folder: Path) -> dict[str, Any]:
    """Build, save, take two steps, measure, save."""
    with trainer_of(recipe, world, folder) as trainer:
        trainer.save()
        kept = parity.Losses()
        parity.watch(trainer, kept)
        trainer.train()
        del trainer.callbacks.by_name["Losses"]
        trainer.save()
        return {"losses": kept.losses, "measured": trainer.measure()["loss"]}


def loaded(recipe: Recipe, world: World, folder: Path, other: Path) -> dict[str, Any]:
    """Start from the weights of another run, and become that run: the loss on the test split of each."""
    with trainer_of(
        recipe.set("weights", {"from": str(checkpoint.resolve(other))}), world, folder
    ) as trainer:
        found = {"started": trainer.measure()["loss"]}
        for engine in trainer.engines.values():
            for part in engine.weights:
                part.tensor.fill_(float("nan"))
        trainer.load(checkpoint.Reader(checkpoint.resolve(other)))
        return found | {"resumed": trainer.measure()["loss"]}


def limited(strategy: str, work: str, data: str, folder: str) -> dict[str, Any]:
    """What a rank does under zero3 or fsdp2 with a network, with room for less than a copy of it."""
    here, small = Path(folder), recipe(data, strategy, 8, 2)
    world = limited_world(lambda world: two_steps(small, world, here / f"small-{work}"), LIMIT)
    large = recipe(data, strategy)
    if work == "train":
        found = two_steps(large, world, here / "run")
    else:
        found = loaded(large, world, here / "loaded", here / "run")
    try:
        torch.zeros(WEIGHTS, dtype=torch.uint8)
    except RuntimeError as error:
        found["whole"] = str(error)
    world.leave()
    return found


ROOM_WITHOUT_STATE = 5 * WEIGHTS
"""Of one rank under zero3 with AdamW: weights, their copy for the update and gradients are 3.2, what is there while it
is built 4.1, and with the optimiser's state 6.2."""


def state_on_disk(data: str, folder: str, nvme_path: str | None) -> list[float]:
    """The losses of two steps of AdamW, with room for its state on a disk only."""
    disk = {"nvme_path": nvme_path} if nvme_path else {}
    few = {"reduce_bucket_size": 500_000, "sub_group_size": 1_000_000}
    expert = {"deepspeed": {"zero_optimization": few}}
    spread = {"name": "zero3", "offload": "optimizer", **expert, **disk}

    def steps(world: World, *size: int) -> list[float]:
        here = recipe(data, "single", *size).set("strategy", spread).set("evaluate", None)
        here = here.set("optimizer", {"name": "adamw", "learning_rate": 1e-3})
        with trainer_of(here, world, Path(folder) / f"{nvme_path is None}-{len(size)}") as trainer:
            kept = parity.Losses()
            parity.watch(trainer, kept)
            trainer.train()
            return kept.losses

    world = limited_world(lambda world: steps(world, 8, 2), ROOM_WITHOUT_STATE)
    found = steps(world)
    world.leave()
    return found


def limited_world(warm_up: Callable[[World], Any], limit: int) -> World:
    """Join the world; after `warm_up`, which brings threads and buffers, there is room for `limit` bytes."""
    world = World.join(group=True)
    pin_threads(1, 1)
    # what is freed goes back, so that what is taken is what is needed (mallopt(3))
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    warm_up(world)
    most = data_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return world


def data_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA: private writable memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
