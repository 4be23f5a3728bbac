"""Every optimiser under every strategy, with groups of all kinds. Ranks import this file by name."""

from __future__ import annotations

import functools
import traceback
from pathlib import Path
from typing import Any

import torch
from engine_cases import accumulate, batches, engine_of, load_engine, numbers, save_engine
from torch import nn

from dist_train import components
from dist_train.engine import Engine
from dist_train.parameter_groups import assign, heed_groups, parameter_groups
from dist_train.recipe.sections import GroupSettings
from dist_train.world import World, pin_threads

OPTIMIZERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, ["momentum_buffer"]),
    "adam": ({}, ["exp_avg", "exp_avg_sq"]),
    "rmsprop": ({"momentum": 0.5}, ["momentum_buffer", "square_avg"]),
    "adagrad": ({}, ["sum"]),
    "adafactor": ({}, ["col_var", "row_var", "variance"]),
    "muon": ({}, ["exp_avg", "exp_avg_sq", "momentum_buffer"]),
}
WHOLE = ("adafactor", "muon")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3-persistent", "fsdp2")
PAIRS = [
    (optimizer, strategy)
    for strategy in STRATEGIES
    for optimizer in OPTIMIZERS
    if optimizer not in WHOLE or strategy == "ddp"
]
SETTINGS = GroupSettings(
    l1=0.3,
    groups=[
        {"match": "0.*", "frozen": True},
        {"match": "*.bias", "learning_rate_scale": 0.1, "weight_decay": 0.5},
    ],
)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def engine_with(world: World, optimizer: str, strategy: str) -> Engine:
    module = network()
    rule_of = assign({"net": module}, SETTINGS)
    groups = functools.partial(
        parameter_groups, weight_decay=0.1, settings=SETTINGS, rule_of=rule_of
    )
    spec = {"name": optimizer, "learning_rate": 0.02, "weight_decay": 0.1}
    spec |= OPTIMIZERS[optimizer][0]

    def make(groups: Any) -> torch.optim.Optimizer:
        return heed_groups(components.build("optimizer", spec, "optimizer", groups=groups))

    return engine_of(strategy, world, module, make, groups=groups)


def turns(engine: Engine, first: int, last: int) -> None:
    for index, (x, y) in enumerate(batches(4)[first:last], first):
        engine.set_learning_rate(0.02 * (1 - 0.1 * index))
        engine.scale_setting("momentum", 1 - 0.2 * index)
        engine.scale_setting("l1", 1 + index)
        accumulate(engine, x, y)
        engine.clip(norm=0.5)
        engine.step()


def train_and_move(world: World, optimizer: str, strategy: str, folder: Path) -> dict[str, Any]:
    """Three turns; saved, loaded into a new engine, and a fourth turn by both."""
    e = engine_with(world, optimizer, strategy)
    turns(e, 0, 3)
    found = {
        "weights": numbers(e.full_weights()),
        "frozen": sorted(name.removeprefix("net.") for name in e.names if name not in e.trained),
        "kinds": sorted(e.optimizer_state),
    }
    place = folder / f"{optimizer}-{strategy}-{world.size}"
    save_engine(e, place)
    turns(e, 3, 4)
    again = engine_with(world, optimizer, strategy)
    for _, part in again.slices():  # nothing of what was there may remain
        part.tensor.fill_(float("nan"))
    load_engine(again, place)
    turns(again, 3, 4)
    return {
        **found,
        "unbroken": numbers(e.full_weights()),
        "resumed": numbers(again.full_weights()),
    }


def two_ranks(folder: str) -> dict[str, Any]:
    world = World.join(group=True)
    pin_threads(1, 1)
    found: dict[str, Any] = {strategy: {} for strategy in STRATEGIES}
    for optimizer, strategy in PAIRS:
        try:
            found[strategy][optimizer] = train_and_move(world, optimizer, strategy, Path(folder))
        except Exception:
            found[strategy][optimizer] = {"error": traceback.format_exc(limit=-3)}
    found["moved"] = {}
    for source, target in (("zero3", "ddp"), ("ddp", "zero3-persistent"), ("zero1", "zero3")):
        e = engine_with(world, "rmsprop", target)
        load_engine(e, Path(folder) / f"rmsprop-{source}-2")
        found["moved"][f"{source} -> {target}"] = {
            "weights": numbers(e.full_weights()),
            "source": found[source]["rmsprop"]["weights"],
        }
    return found
