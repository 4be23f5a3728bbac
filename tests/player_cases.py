"""What ranks do for test_players.py. Ranks import this file by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import engine_cases
import torch
import torch.nn.functional as F
from parity_models import family_recipe
from torch import Tensor, nn

from dist_train import checkpoint, run
from dist_train.networks.batch_norm import synchronise
from dist_train.networks.blocks import recompute_activations
from dist_train.world import World, pin_threads

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
WAYS = ("streamed", "recomputed", "given", "frozen")


def images() -> nn.Module:
    """With batch norm over images and over vectors, nothing of whose true gradient is 0."""
    torch.manual_seed(12)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3, bias=False),
        nn.BatchNorm1d(4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(12, 6, bias=False),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    )


def translator() -> nn.Module:
    torch.manual_seed(13)
    return nn.Linear(5, 5)


def loss_of(way: str, net: Any, other: Any, x: Tensor, y: Tensor) -> Tensor:
    if way == "given":
        return engine_cases.penalty(net, x) + F.cross_entropy(net(x), y)
    if way == "frozen":
        return F.cross_entropy(other(net(x)), y)
    return F.cross_entropy(net(x), y)


def whole_batch(way: str) -> dict[str, Any]:
    """One process with the global batch in one forward."""
    (x, y), *_ = engine_cases.batches(1)
    own = translator() if way == "frozen" else images()
    loss = loss_of(way, own, images(), x, y)
    loss.backward()
    gradients = {f"net.{n}": p.grad.double().tolist() for n, p in own.named_parameters()}  # type: ignore[union-attr]
    return {
        "loss": float(loss.detach()),
        "gradients": gradients,
        "buffers": {f"net.{n}": b.double().tolist() for n, b in own.named_buffers()},
    }


def synchronised(world: World, strategy: str, way: str) -> dict[str, Any]:
    """Each rank has its part of the batch, one forward, and batch norm over all ranks."""
    (x, y), *_ = engine_cases.batches(1)
    own, frozen = (translator() if way == "frozen" else images()), images()
    for network in (own, frozen):
        synchronise(network, world)
    if way == "recomputed":
        recompute_activations(own)
    engine = engine_cases.engine_of(strategy, world, own, given=way == "given")
    engine.player.train()
    other = engine_cases.engine_of(strategy, world, frozen)
    x, y = x.chunk(world.size)[world.rank], y.chunk(world.size)[world.rank]
    engine.begin_turn()
    loss = loss_of(way, engine.own("net"), other.frozen("net"), x, y) / world.size
    # the engine counts MICRO_BATCHES / ranks micro-batches: the rest of them add nothing
    engine.backward(loss, last=world.size == engine_cases.MICRO_BATCHES)
    for more in range(1, engine_cases.MICRO_BATCHES // world.size):
        zero = loss_of(way, engine.own("net"), other.frozen("net"), x, y) * 0
        engine.backward(zero, last=more == engine_cases.MICRO_BATCHES // world.size - 1)
    engine.reduce()
    gradients = {n: g.double().tolist() for n, g in engine.full_gradients().items()}
    engine.step()
    return {
        "loss": float(world.sum_(loss.detach().clone())),
        "gradients": gradients,
        "buffers": {n: b.double().tolist() for n, b in engine.buffers.items()},
    }


def all_synchronised() -> dict[str, Any]:
    world = World.join(group=True)
    pin_threads(1, 1)
    found = {
        f"{strategy}-{way}": synchronised(world, strategy, way)
        for strategy in STRATEGIES
        for way in WAYS
    }
    world.leave()
    return found


def cycle_run(data: str, folder: str, name: str, until: int | None, resume: bool) -> dict[str, Any]:
    """The CycleGAN-like run in this world, to step `until`; what its last checkpoint holds."""
    recipe = family_recipe("CycleGAN-like", data, 4, "norm").set("strategy", cases.strategy(name))
    recipe = recipe.set("duration", "8 steps").set("callbacks.checkpoint", {"every": "1 epoch"})
    path = Path(folder)
    run.train(recipe, run_dir=path, until=until, resume="auto" if resume else None)
    reader = checkpoint.Reader(checkpoint.resolve(path))
    pools = {n: reader.whole(n).double().tolist() for n in reader.names("memory/")}
    weights = {n: reader.whole(n).double().tolist() for n in reader.names("weights/")}
    return {"step": reader.step, "pools": pools, "weights": weights}
