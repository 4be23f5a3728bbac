"""What a step of our engine costs beside torch's DistributedDataParallel and fully_shard, and DeepSpeed: interleaved.

    python benchmarks/engine.py [--ranks 2] [--rounds 20] [--json]

A Transformer, AdamW, one micro-batch a rank, no clipping, one thread a rank. Both do forward, backward, reduction and
update of the same network on the same tokens; DeepSpeed has the same configuration in both. A round is a few steps of
one and then of the other, in turn first. The ratio is the median over the rounds of time of ours over time of theirs;
that of processor time (of all threads of rank 0) says little of waiting, but stays true on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_train.engine import make_engine
from dist_train.models.transformer import Transformer
from dist_train.networks import Player
from dist_train.optimizers import adamw
from dist_train.ranks import start_ranks
from dist_train.world import World, pin_threads

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
WARM_UP, STEPS = 3, 3
BATCH, LENGTH, VOCABULARY = 4, 128, 256
Step = Callable[[Tensor, Tensor], None]


def network() -> Any:
    torch.manual_seed(0)
    return Transformer(VOCABULARY, dim=192, depth=4, num_heads=4, max_length=LENGTH)


def groups(named: Any) -> Any:
    return [{"params": [parameter for _, parameter in named]}]


def optimizer(groups: Any) -> torch.optim.Optimizer:
    return adamw(groups, 1e-4)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def ours(strategy: str, world: World) -> Step:
    player = Player({"net": network()}, "fp32", "cpu")
    engine = make_engine(
        {"name": strategy}, player, groups, optimizer, world, given=False, micro_batches=1
    )
    share = 1 / world.size  # of the global batch: our gradients are sums over the ranks

    def step(tokens: Tensor, targets: Tensor) -> None:
        engine.begin_turn()
        engine.backward(loss_of(engine.own("net")(tokens), targets), share, last=True)
        engine.reduce()
        engine.step()

    return step


def raw(strategy: str, world: World) -> Step:
    module = network()
    if strategy == "ddp":
        parallel = DistributedDataParallel(module)
        update = optimizer(groups(module.named_parameters()))

        def step(tokens: Tensor, targets: Tensor) -> None:
            update.zero_grad()
            loss_of(parallel(tokens), targets).backward()
            update.step()

        return step
    if strategy == "fsdp2":
        for part in [*module.blocks, module]:
            sharded = fully_shard(part, reshard_after_forward=True)
            sharded.set_gradient_divide_factor(1.0)  # gloo has sums alone
            sharded.set_force_sum_reduction_for_comms(True)
        update = optimizer(groups(module.named_parameters()))

        def fsdp_step(tokens: Tensor, targets: Tensor) -> None:
            update.zero_grad()
            (loss_of(module(tokens), targets) / world.size).backward()
            update.step()

        return fsdp_step
    from dist_train.engine.zero import configuration, import_deepspeed

    engine, *_ = import_deepspeed().initialize(
        model=module,
        optimizer=optimizer(groups(module.named_parameters())),
        dist_init_required=False,
        config=configuration(int(strategy[-1]), {}, 1),
    )

    def step(tokens: Tensor, targets: Tensor) -> None:
        engine.backward(loss_of(engine(tokens), targets))
        engine.step()

    return step


def measure(strategy: str, world: World, rounds: int) -> dict[str, float]:
    """Milliseconds a step of each, and the ratio."""
    made = {"ours": ours(strategy, world), "raw": raw(strategy, world)}
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    took: dict[str, list[float]] = {name: [] for name in made}
    worked: dict[str, list[float]] = {name: [] for name in made}
    for number in range(WARM_UP + rounds):
        for name in sorted(made, reverse=bool(number % 2)):
            world.barrier()
            began, worked_before = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                made[name](tokens[:, :-1], tokens[:, 1:])
            world.barrier()
            if number >= WARM_UP:
                took[name].append((time.perf_counter() - began) / STEPS)
                worked[name].append(time.process_time() - worked_before)
    return {
        "ours_ms": 1e3 * statistics.median(took["ours"]),
        "raw_ms": 1e3 * statistics.median(took["raw"]),
        "ratio": _ratio(took),
        "processor_ratio": _ratio(worked),
    }


def _ratio(seconds: dict[str, list[float]]) -> float:
    pairs = zip(seconds["ours"], seconds["raw"], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def measure_all(rounds: int, strategies: list[str]) -> dict[str, dict[str, float]]:
    """In this world, under each strategy."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = {strategy: measure(strategy, world, rounds) for strategy in strategies}
    world.leave()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    found: dict[str, Any] = start_ranks(
        arguments.ranks, measure_all, arguments.rounds, list(arguments.strategies)
    )[0]
    found["cores"] = os.cpu_count()
    if arguments.json:
        print(json.dumps(found))
        return
    print("strategy   ours, ms a step   raw, ms a step   ratio   of processor time")
    for strategy in arguments.strategies:
        one = found[strategy]
        print(
            f"{strategy:8} {one['ours_ms']:17.1f} {one['raw_ms']:16.1f} {one['ratio']:7.3f}"
            f" {one['processor_ratio']:19.3f}"
        )


if __name__ == "__main__":
    main()
