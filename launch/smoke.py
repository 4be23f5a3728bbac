"""A smoke test of real nodes: every rank multiplies matrices and reduces sums for a while; who is bad is named.

`python -m dist_train.launch.smoke SECONDS`, once a rank under any launcher. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dist_train
from dist_train.errors import UserError
from dist_train.rendezvous import RendezvousError

SCRIPT = Path(dist_train.__file__).parent / "slurm" / "smoke.sbatch"
SLOW, SLOW_LINK, SKEW = 0.75, 0.5, 1.0
"""Bad is: below this share of the others' median, in multiplying and between neighbours; clocks so many seconds off."""
REDUCED, SENT = 16 << 20, 4 << 20
"""Bytes of a sum, and of what neighbours send each other."""


def smoke(seconds: float) -> dict[str, Any]:
    """Measure this rank among the others; the figures of all, and `bad`: {host: reasons}, on every rank."""
    from dist_train.world import World

    world = World.join()
    world.barrier()
    clock = time.time()
    mine: dict[str, Any] = {"rank": world.rank, "host": socket.gethostname(), "clock": clock}
    mine |= _multiply(world, 0.6 * seconds)
    if world.size > 1:
        mine |= _reduce(world, 0.3 * seconds) | _link(world)
    ranks = world.gather(mine)
    world.leave()
    return {"ranks": ranks, "bad": bad(ranks)}


def _multiply(world: Any, seconds: float) -> dict[str, Any]:
    """TFLOP/s of one large matrix product, and the sum of its entries, which equal devices must agree on."""
    import torch

    gpu = world.device.startswith("cuda")
    size, kind = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator).to(world.device, kind) for _ in "ab"
    )
    product = left @ right
    sums, count, begun = {product.double().sum().item()}, 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(5):
            product = left @ right
        sums.add(product.double().sum().item())  # which waits for the device
        count += 5
    speed = 2 * size**3 * count / (time.perf_counter() - begun) / 1e12
    name = torch.cuda.get_device_name(world.device) if gpu else _processor()
    return {"device": name, "tflops": round(speed, 4), "checksums": sorted(sums)}


def _processor() -> str:
    """The model, and the threads in use: on both depends in which order a product is summed."""
    import torch

    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1] for line in lines if line.startswith("model name")), model)
    return f"{model.strip() or 'cpu'} x {torch.get_num_threads()}"


def _reduce(world: Any, seconds: float) -> dict[str, Any]:
    """GB/s of payload that a sum over all ranks moves through each of them."""
    import torch

    buffer = torch.ones(REDUCED // 4, device=world.device)
    begun, count = time.perf_counter(), 0
    while world.agree(time.perf_counter() - begun < seconds):
        world.sum_(buffer)
        buffer.fill_(1)
        count += 1
    elapsed = time.perf_counter() - begun
    moved = 2 * (world.size - 1) / world.size * REDUCED * count
    wrong = world.sum_(buffer)[0].item() != world.size
    return {"reduce_gb_s": round(moved / elapsed / 1e9, 3), "wrong_sums": wrong}


def _link(world: Any) -> dict[str, Any]:
    """GB/s from the rank before this one; one pair after the other, so that each has the network for itself."""
    import torch
    import torch.distributed as dist

    buffer, speed = torch.ones(SENT // 4, device=world.device), 0.0
    for source in range(world.size):
        target = (source + 1) % world.size
        world.barrier()
        begun = time.perf_counter()
        for _ in range(3):
            if world.rank == source:
                dist.send(buffer, target)
            elif world.rank == target:
                dist.recv(buffer, source)
        if world.rank == target:
            buffer.sum().item()  # waits for the device
            speed = 3 * SENT / (time.perf_counter() - begun) / 1e9
    return {"link_gb_s": round(speed, 3)}


def bad(ranks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """{host: reasons} for what is slow, wrong, or has another time than rank 0."""
    found: dict[str, list[str]] = {}

    def blame(rank: Mapping[str, Any], reason: str) -> None:
        found.setdefault(rank["host"], []).append(f"rank {rank['rank']}: {reason}")

    for rank in ranks:
        alike = [other for other in ranks if other["device"] == rank["device"]]
        others = [other["tflops"] for other in alike if other is not rank]
        if others and rank["tflops"] < SLOW * statistics.median(others):
            usual = statistics.median(others)
            blame(rank, f"{rank['tflops']:g} TFLOP/s, the others {usual:g}")
        sums = Counter(other["checksums"][0] for other in alike)
        (common, votes), *rest = sums.most_common()
        nobody_knows = any(count == votes for _, count in rest)
        if len(rank["checksums"]) > 1:
            blame(rank, "multiplies wrongly: the same product has several results")
        elif rank["checksums"][0] != common or nobody_knows:
            blame(rank, "multiplies wrongly: its product differs from the others'")
        if rank.get("wrong_sums"):
            blame(rank, "got a wrong sum over all ranks")
        if abs(rank["clock"] - ranks[0]["clock"]) > SKEW:
            blame(rank, f"its clock is {rank['clock'] - ranks[0]['clock']:+.1f} s off rank 0's")
    links = [rank["link_gb_s"] for rank in ranks if "link_gb_s" in rank]
    for number, rank in enumerate(ranks if len(links) > 2 else ()):
        both = (links[number], links[(number + 1) % len(links)])
        if max(both) < SLOW_LINK * statistics.median(links):
            blame(
                rank,
                f"{max(both):g} GB/s to its neighbours, usual are {statistics.median(links):g}",
            )
    return found


def smoke_here(ranks: int, seconds: float) -> dict[str, Any]:
    """The smoke test of this machine."""
    from dist_train.ranks import start_ranks

    return start_ranks(ranks, smoke, seconds, timeout=seconds + 300)[0]


def smoke_on_slurm(
    nodes: int,
    ranks_per_node: int,
    gpus_per_node: int,
    partition: str | None,
    seconds: float,
    patience: float,
) -> dict[str, Any]:
    """The smoke test of nodes that Slurm gives within `patience` seconds. They must see the current folder.

    UserError for nodes that there are not, at once, and for those that do not come.
    """
    from dist_train.launch.backend import travelling
    from dist_train.launch.slurm import STATES, slurm, states

    waiting = set(STATES["waiting"])
    active = waiting | set(STATES["running"])

    with tempfile.TemporaryDirectory(dir=".", prefix=".smoke-") as folder:
        output = Path(folder).resolve() / "output"
        options = {
            "nodes": nodes,
            "ntasks-per-node": ranks_per_node,
            "gpus-per-node": gpus_per_node or None,
            "partition": partition,
            "output": str(output).replace("%", "%%"),
            "export": ",".join(travelling(["SLURM_CONF"])),
        }
        words = [f"--{key}={value}" for key, value in options.items() if value is not None]
        words += [str(SCRIPT), sys.executable, f"{seconds:g}"]
        slurm("sbatch", "--test-only", *words)
        job = slurm("sbatch", "--parsable", *words).partition(";")[0].strip()
        sys.stderr.write(f"job {job}: waiting for {nodes} nodes\n")
        deadline = time.monotonic() + patience
        try:
            while (now := {state for state, _ in states(job)}) & active:
                if now & waiting and time.monotonic() > deadline:
                    reason = slurm("squeue", "--noheader", "--format=%r", f"--jobs={job}").strip()
                    raise UserError(
                        f"--nodes {nodes}: Slurm has not given them within {patience:g} s ({reason});"
                        " --within SECONDS waits longer, `sinfo` shows which nodes there are"
                    )
                time.sleep(1)
        except BaseException:
            slurm("scancel", job)
            raise
        text = output.read_text(errors="replace") if output.exists() else ""
    reports = [line for line in text.splitlines() if line.startswith('{"')]
    found = json.loads(reports[-1]) if reports else {"error": text[-2000:] or "no output"}
    if "error" in found:
        raise UserError(f"smoke test, job {job}: {found['error']}")
    return found


def main(seconds: float) -> int:
    """One rank of a smoke test that a launcher has started."""
    try:
        found = smoke(seconds)
    except RendezvousError as error:  # which names the ranks that did not come
        found = {"error": str(error), "bad": True}
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        sys.stdout.write(json.dumps(found) + "\n")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
