"""What ranks do for test_blocks.py. Ranks import this file by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import engine_cases
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train import randomness
from dist_train.networks import blocks
from dist_train.recipe import Recipe
from dist_train.verify.parity import Losses
from dist_train.world import World, pin_threads

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3-all", "fsdp2")
WAYS = ("streamed", "given", "penalty", "bf16")
RUNS = (
    "transformer-activation_checkpointing-zero2",
    "transformer-chunk-ddp",
    "transformer-chunk-zero3",
    "resnet-activation_checkpointing-zero3",
    "resnet-channels_last-ddp",
    "resnet-channels_last-zero1",
    "resnet-channels_last-zero3",
    "wgan_gp-channels_last-zero2",
    "wgan_gp-channels_last-ddp",
)
"""MODEL-SETTING-STRATEGY."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))


class Blocks(nn.Module):
    """All that recomputation could do twice: random draws, running statistics, power iterations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def two_turns(world: World, strategy: str, way: str, recompute: bool) -> list[dict[str, Tensor]]:
    """The gradients of two turns, then weights and buffers."""
    network = Blocks()
    if recompute:
        for module in blocks.repeated_blocks({"net": network}, "here")["net"]:
            blocks.recompute_activations(module)
    engine = engine_cases.engine_of(
        strategy,
        world,
        network,
        given=way in ("given", "penalty"),
        precision="bf16" if way == "bf16" else "fp32",
    )
    found = []
    share = engine_cases.MICRO_BATCHES // world.size
    mine = range(world.rank * share, (world.rank + 1) * share)
    for step, (x, y) in enumerate(engine_cases.batches(2)):
        engine.begin_turn()
        for i in mine:
            randomness.reseed(1, step, 0, i)
            net, part = engine.own("net"), x.chunk(engine_cases.MICRO_BATCHES)[i]
            truth = y.chunk(engine_cases.MICRO_BATCHES)[i]
            penalised = way == "penalty"
            loss = (
                engine_cases.penalty(net, part) if penalised else F.cross_entropy(net(part), truth)
            )
            engine.backward(loss / engine_cases.MICRO_BATCHES, last=i == mine[-1])
        engine.reduce()
        found.append({name: g.clone() for name, g in engine.full_gradients().items()})
        engine.step()
    return [*found, engine.full_weights()]


def recomputed() -> dict[str, list[float]]:
    """Largest differences between recomputing and keeping, by strategy and way."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = {}
    for strategy in STRATEGIES:
        for way in WAYS:
            pair = [two_turns(world, strategy, way, recompute) for recompute in (True, False)]
            found[f"{strategy}-{way}"] = [
                max(float((a[name] - b[name]).abs().max()) for name in b)
                for a, b in zip(*pair, strict=True)
            ]
    world.leave()
    return found


def losses_of(recipe: Recipe, world: World, folder: Path) -> list[float]:
    """The global losses of 3 steps."""
    with cases.trainer_of(recipe.set("callbacks.checkpoint", None), world, folder) as trainer:
        kept = Losses()
        trainer.callbacks.by_name["losses"] = kept
        trainer.train(until=3)
    return kept.losses


def changed(recipe: Recipe, setting: str) -> Recipe:
    values: dict[str, Any] = {"channels_last": True, "activation_checkpointing": "auto"}
    if setting == "chunk":
        return recipe.set("objective.chunk", 50)
    return recipe.set(setting, values[setting])


def with_settings(data: str, folder: str) -> dict[str, float]:
    """Largest relative difference of a loss between a run with a setting and without, by case."""
    world = World.join(group=True)
    found = {}
    for case in RUNS:
        model, setting, strategy = case.split("-")
        recipe = cases.tiny_recipe(model, data, strategy=cases.strategy(strategy))
        off = losses_of(recipe, world, Path(folder) / f"{case}-off")
        on = losses_of(changed(recipe, setting), world, Path(folder) / f"{case}-on")
        found[case] = max(abs(a - b) / max(abs(a), 1.0) for a, b in zip(off, on, strict=True))
    world.leave()
    return found
