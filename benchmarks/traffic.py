"""What a step sends: the payload that ranks hand to collectives under each strategy, and what gloo sends for it.

    python benchmarks/traffic.py [--ranks 2 4] [--json]

A multilayer perceptron of P bytes of weights, one micro-batch a rank; the mean over all ranks and 3 steps, in units of
P (N - 1) / N. Theory says 2 for ddp, zero1 and zero2, and 3 for zero3 (`dist_train.wire.Payload` says how it counts).
gloo's own bytes are what the TCP connections of a rank have sent by the kernel's count, so this runs on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import stat
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_train.engine import make_engine
from dist_train.networks import Player
from dist_train.ranks import start_ranks
from dist_train.verify.payload import Payload
from dist_train.world import World, pin_threads

STEPS, WIDTH, DEPTH = 3, 512, 6
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
BYTES_SENT = 200
"""Where the kernel's `struct tcp_info` has `tcpi_bytes_sent`, 8 bytes (linux/tcp.h, since Linux 4.19)."""


def tcp_bytes_sent() -> int:
    """What all TCP connections of this process have sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed in the meantime
            continue
        total += struct.unpack_from("=Q", info, BYTES_SENT)[0]
    return total


def measure(world: World, strategy: str) -> dict[str, float]:
    """Of a step, the mean over the ranks in units of P (N - 1) / N: `payload` and `sent`."""
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    player = Player({"net": nn.Sequential(*layers)}, "fp32", "cpu")
    engine = make_engine(
        {"name": strategy},
        player,
        lambda named: [{"params": [parameter for _, parameter in named]}],
        lambda groups: torch.optim.SGD(groups, lr=0.01),
        world,
        given=False,
        micro_batches=1,
    )
    size = 4 * sum(engine.shape(parameter).numel() for parameter in engine.trained.values())

    def steps(count: int) -> None:
        for _ in range(count):
            engine.begin_turn()
            engine.backward(engine.own("net")(torch.ones(2, WIDTH)).square().mean(), last=True)
            engine.reduce()
            engine.step()
        world.barrier()

    steps(2)  # in which DeepSpeed learns the order of the layers
    before = tcp_bytes_sent()
    with Payload() as payload:
        steps(STEPS)
    unit = STEPS * size * (world.size - 1) / world.size
    every = world.gather([payload.bytes / unit, (tcp_bytes_sent() - before) / unit])
    return {
        "payload": sum(mine for mine, _ in every) / world.size,
        "sent": sum(mine for _, mine in every) / world.size,
    }


def measure_all() -> dict[str, dict[str, float]]:
    """In this world, under each strategy."""
    world = World.join(group=True)
    pin_threads(1, 1)
    found = {strategy: measure(world, strategy) for strategy in STRATEGIES}
    world.leave()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    found: Mapping[int, Any] = {n: start_ranks(n, measure_all)[0] for n in arguments.ranks}
    if arguments.json:
        print(json.dumps(found))
        return
    print("ranks  strategy  payload  sent by gloo, in units of P (N - 1) / N")
    for ranks, by_strategy in found.items():
        for strategy, one in by_strategy.items():
            print(f"{ranks:5}  {strategy:8} {one['payload']:8.3f} {one['sent']:13.3f}")


if __name__ == "__main__":
    main()
